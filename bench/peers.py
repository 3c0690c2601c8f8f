"""nginx and HAProxy as further yardsticks: what passing through costs in C.

They check no key, read no JSON and count nothing, so no goal rests on them; they show
how far down it goes. Each runs as one process with one thread, with reused connections
to the engine and without buffering of answers.
"""

import shutil
from pathlib import Path
from typing import Final

NGINX: Final = "nginx"
HAPROXY: Final = "haproxy"

# More than the most streams that are ever held, on both sides.
_CONNECTIONS = 8192

_NGINX = """\
daemon off; master_process off; worker_processes 1; pid {folder}/pid;
error_log stderr error;
events {{ worker_connections {connections}; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 16m;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream mock {{
    server 127.0.0.1:{mock_port}; keepalive 1024; keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://mock; proxy_http_version 1.1;
      proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""

_HAPROXY = """\
global
  nbthread 1
  maxconn {connections}
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend front
  bind 127.0.0.1:{port} backlog 4096
  default_backend mock
backend mock
  http-reuse always
  server mock 127.0.0.1:{mock_port}
"""


def program(name: str) -> str | None:
    """Where a peer is installed, if it is. Debian's are not on every user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def command(name: str, folder: Path, *, port: int, mock_port: int) -> list[str]:
    """Write a peer's configuration; what starts it."""
    found = program(name)
    assert found is not None, name
    template = _NGINX if name == NGINX else _HAPROXY
    config = folder / "config"
    config.write_text(
        template.format(
            folder=folder, port=port, mock_port=mock_port, connections=_CONNECTIONS
        )
    )
    if name == NGINX:
        return [found, "-p", str(folder), "-e", "stderr", "-c", str(config)]
    return [found, "-db", "-q", "-f", str(config)]
