// Configuration: the owner's text, checked as one types, with the difference before it
// is saved.

import { call, get, pause } from "../api.js";
import { plural } from "../format.js";
import { stateMark } from "../marks.js";
import { announce, press, snippet } from "../press.js";
import { el, fill, inline, mark, say, simpleButton, visible } from "../text.js";

export const view = { name: "config", letter: "c", title: "Configuration", mount };

const AFTER_TYPING = 350; // ms

// What was typed and not saved stays while the page is open.
let draft = null; // {text, revision, path}

addEventListener("beforeunload", (event) => {
	if (draft) event.preventDefault();
});

function mount(main, { signal }) {
	const where = el("div", { class: "hint" });
	const text = el("textarea", { class: "code", id: "config", "aria-label": "Configuration as YAML", spellcheck: "false",
		autocapitalize: "none", autocomplete: "off", wrap: "off", disabled: true });
	const numbers = el("pre", { class: "numbers", "aria-hidden": "true" });
	const is = stateMark("loading", "…");
	const findings = el("ul", { class: "findings", "aria-label": "What the check says", "aria-live": "polite" });
	const difference = el("pre", { class: "diff", tabindex: "0", role: "region", "aria-label": "Difference to what is saved" });
	const saving = press("Save and reload", () => store(true), { kind: "strong", title: "Puts it into force at once" });
	const onlySaving = press("Only save", () => store(false), { title: "It counts from the next reload or start" });
	const leaving = press("Take it back", () => {
		draft = null;
		return load();
	}, { question: "Forget what was typed?", yes: "Yes, forget it", kind: "plain" });
	const reloading = press("Reload", async () => {
		const { problems } = await call("POST", "reload");
		return problems?.length ? problems.map(worded).join(" · ") : "the file and the keys are in force as they are now";
	}, { title: "Read the file and the keys again" });
	const restarting = press("Restart", async () => {
		await call("POST", "restart");
		return "it drains and starts anew; this page comes back by itself";
	}, { question: "Open requests may finish, loaded models are unloaded. Restart?", yes: "Yes, restart", kind: "danger" });
	reloading.classList.add("end");
	const rest = el("div", { class: "panel" },
		el("div", { class: "editing" },
			el("div", { class: "editor" }, numbers, text),
			el("section", { class: "checking", "aria-label": "Check" },
				el("p", { class: "tools" }, is), findings,
				el("h2", {}, "Difference"), difference)),
		el("p", { class: "tools" }, saving, onlySaving, leaving));
	main.append(el("div", { class: "tools" }, where, reloading, restarting), rest);

	let saved = null; // the answer of GET config
	let checked = null; // the answer of the last check

	async function load() {
		saved = await get("config", signal);
		say(where, inline(saved.path ?? ""));
		rest.hidden = !saved.path;
		if (rest.hidden) {
			fill(where, el("p", {}, "There is no file; what runs here is used. This writes one with all that it finds:"),
				snippet("inferencia init", "Command that writes a configuration"));
			return;
		}
		if (draft && draft.path !== saved.path) draft = null;
		text.value = draft ? draft.text : saved.text;
		text.disabled = false;
		text.readOnly = !saved.can_save;
		fill(findings);
		drawNumbers();
		await check();
		if (draft && draft.revision !== saved.revision) {
			draft.revision = saved.revision;
			findings.prepend(el("li", {}, stateMark("waiting", "The file has changed since you began. The difference is to how it is now; saving replaces that.")));
		}
	}

	const isChanged = () => saved !== null && text.value !== saved.text;

	let asking = 0;
	async function check() {
		const mine = ++asking;
		const typed = text.value;
		is.update("running", "checking");
		try {
			const answer = await call("POST", "config/check", { text: typed }, signal);
			if (mine !== asking) return;
			checked = answer;
			drawCheck();
		} catch (error) {
			if (mine !== asking || signal.aborted) return;
			checked = null;
			is.update("failed", inline(error.message));
			allow();
		}
	}

	function drawCheck() {
		const { ok, errors, warnings, diff } = checked;
		const locked = checked.protected ?? [];
		const later = checked.restart ?? [];
		is.update(ok && !locked.length ? "ready" : "failed", !ok ? plural(errors.length, "error") : locked.length ? "it may not be saved here" : isChanged() ? "it can be saved" : "as saved");
		fill(findings,
			errors.map((one) => finding("failed", one, typeof one.line === "number" ? one.line : lineOf(one.path))),
			locked.map((name) => finding("failed", { path: name, message: "may not be changed here (admin.edit_commands)" }, lineOf(name))),
			warnings.map((one) => finding("waiting", one, lineOf(one.path))),
			later.map((name) => finding("stopped", { path: name, message: "takes effect at the next start" }, lineOf(name))));
		drawDifference(difference, diff ?? "");
		drawNumbers(errors.map((one) => one.line ?? lineOf(one.path)));
		allow();
	}

	function finding(state, { path, message }, line) {
		const words = path ? `${inline(path)}: ${inline(message)}` : inline(message);
		const node = el("li", {}, stateMark(state, words));
		if (line) {
			node.append(" ", simpleButton(`line ${line}`, () => goTo(line)));
		}
		return node;
	}

	/** About where a key such as backends[1].timeout stands. */
	function lineOf(path) {
		if (!path) return null;
		const lines = text.value.split("\n").map((line) => line.replace(/(^|\s)#.*/, ""));
		let at = -1;
		for (const part of path.match(/[^.[\]]+|\[\d+\]/g) ?? []) {
			if (part.startsWith("[")) {
				let left = Number(part.slice(1, -1));
				const next = lines.findIndex((line, place) => place >= at && /^\s*- /.test(line) && left-- === 0);
				if (next < 0) break;
				at = next;
			} else {
				const name = part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
				const next = lines.findIndex((line, place) => place >= at && new RegExp(`(^|[\\s{,-])["']?${name}["']?\\s*:`).test(line));
				if (next < 0) break;
				at = next;
			}
		}
		return at < 0 ? null : at + 1;
	}

	function goTo(line) {
		const lines = text.value.split("\n");
		const start = lines.slice(0, line - 1).reduce((sum, one) => sum + one.length + 1, 0);
		text.focus();
		text.setSelectionRange(start, start + (lines[line - 1]?.length ?? 0));
		text.scrollTop = Math.max(0, (line - 4) * (text.scrollHeight / lines.length));
	}

	function allow() {
		const locked = checked?.protected?.length ?? 0;
		const can = Boolean(saved?.can_save && checked?.ok && !locked && isChanged());
		saving.button.disabled = !can;
		onlySaving.button.disabled = !can;
		leaving.hidden = !isChanged();
	}

	async function store(reload) {
		try {
			const answer = await call("PUT", "config", { text: text.value, revision: draft?.revision ?? saved.revision, reload });
			draft = null;
			announce("saved");
			await load();
			const parts = [`saved; before: ${inline(answer.backup ?? "–")}`];
			if (reload) parts.push(answer.reloaded ? "in force" : "not in force");
			if (answer.restart?.length) parts.push(`at the next start: ${answer.restart.map(inline).join(", ")}`);
			if (answer.problems?.length) parts.push(answer.problems.map(worded).join(" · "));
			return parts.join(" · ");
		} catch (error) {
			const known = saved.revision;
			if (error.status === 409) await load();
			throw saved.revision === known ? error : new Error("not saved yet: the file has changed, look at the difference");
		} finally {
			setTimeout(allow);
		}
	}

	function drawNumbers(wrong = []) {
		const count = text.value.split("\n").length;
		fill(numbers, Array.from({ length: count }, (_, place) =>
			el("span", { class: wrong.includes(place + 1) ? "bad" : null }, `${place + 1}\n`)));
		numbers.scrollTop = text.scrollTop;
	}

	text.addEventListener("scroll", () => (numbers.scrollTop = text.scrollTop));
	text.addEventListener("input", async () => {
		draft = isChanged() ? { text: text.value, revision: draft?.revision ?? saved.revision, path: saved.path } : null;
		drawNumbers();
		saving.button.disabled = true;
		onlySaving.button.disabled = true;
		leaving.hidden = !draft;
		const mine = ++asking;
		await pause(AFTER_TYPING, signal);
		if (mine === asking && !signal.aborted) check();
	});
	allow();
	load().catch((error) => {
		if (!signal.aborted) is.update("failed", inline(error.message));
	});
}

/** A problem, which may be a text or {path, message}. */
const worded = (one) => (typeof one === "string" ? inline(one) : [one.path, one.message].filter(Boolean).map(inline).join(": "));

function drawDifference(node, diff) {
	const lines = diff.trimEnd().split("\n").filter((line) => !/^(---|\+\+\+) /.test(line));
	if (!lines.join("").trim()) {
		fill(node, "none");
		return;
	}
	fill(node, lines.map((line) => {
		const kind = line.startsWith("+") ? "ins" : line.startsWith("-") ? "del" : "span";
		const one = el(kind, {}, visible(line), "\n");
		mark(one, "class", line.startsWith("@@") ? "place" : null);
		return one;
	}));
}
