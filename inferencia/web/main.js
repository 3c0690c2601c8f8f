// The page: who is there, what is shown, the line of truth, and the keyboard.

import * as live from "./live.js";
import { admin, ask, forgetKey, pause, root, storeKey, storedKey } from "./api.js";
import { bytes, bytesOf, rate, short, whole } from "./format.js";
import { here, link } from "./router.js";
import { stateMark } from "./marks.js";
import { el, fill, mark, say, simpleButton } from "./text.js";
import { view as config } from "./views/config.js";
import { view as keys } from "./views/keys.js";
import { view as logs } from "./views/logs.js";
import { view as models } from "./views/models.js";
import { view as now } from "./views/now.js";
import { view as playground } from "./views/playground.js";
import { view as tasks } from "./views/tasks.js";
import { view as usage } from "./views/usage.js";
import { entrance } from "./views/entrance.js";

// In the order of the menu; `letter` follows g.
const VIEWS = [now, models, usage, keys, playground, logs, config, tasks];

const main = document.getElementById("main");
const menu = document.getElementById("views");
const help = document.getElementById("help");
const health = stateMark("unknown", "…");

/** Who is there: {role: "admin" | "user", why}; null before the key is known. */
let session = null;
let shown = null; // AbortController of the view
let isBlind = false; // the view was opened while there was no connection

// --- who is there ---------------------------------------------------------------------

/**
 * Find out what a key may do, and show that.
 * @throws {ApiError} it is of no use here.
 */
async function enter(key) {
	let found = { role: "admin" };
	try {
		await ask(admin("state"), { key });
	} catch (error) {
		if (error.status !== 403 && error.status !== 404) throw error;
		// A user's key, or an administrator's from where it may not be used: in both cases
		// the key's own usage and the playground are left.
		await ask(root("v1/usage"), { key }).catch((second) => {
			throw second.status === 403 || second.status === 404 ? error : second;
		});
		found = { role: "user", why: error.message };
	}
	session = found;
	storeKey(key);
	if (session.role === "admin") live.start();
	else askHealth(() => false).catch(() => {});
	drawMenu();
	show();
}

function leave(reason = "") {
	live.stop();
	forgetKey();
	session = null;
	shown?.abort();
	menu.hidden = true;
	reveal();
	showEntrance(reason);
}

function showEntrance(reason) {
	shown?.abort();
	shown = new AbortController();
	document.title = "inferencia";
	fill(main, entrance({ enter, reason }));
	main.querySelector("#key")?.focus();
}

addEventListener("inferencia:refused", (event) => {
	if (session) leave(event.detail.message);
});

// A browser opens few connections to one server: a page that nobody sees gives its own
// back, and so does one that is left and kept for the way back.
let unseen = 0;
document.addEventListener("visibilitychange", () => {
	clearTimeout(unseen);
	if (document.hidden) unseen = setTimeout(live.rest, 60_000);
	else if (session?.role === "admin") live.start();
});
addEventListener("pagehide", () => {
	live.rest();
	shown?.abort();
});
addEventListener("pageshow", (event) => event.persisted && location.reload());

// --- views ----------------------------------------------------------------------------

const allowed = () => VIEWS.filter((view) => session?.role === "admin" || view.forUsers);

function drawMenu() {
	const items = allowed().map((view) =>
		el("a", { href: link(view.name), "data-view": view.name, "aria-keyshortcuts": `g ${view.letter}` }, view.title));
	const out = simpleButton("Forget the key", () => leave(), { class: "plain leave" });
	fill(menu, el("div", { class: "links" }, items), out);
	menu.hidden = false;
}

function show() {
	if (!session) return;
	const address = here();
	const view = allowed().find(({ name }) => name === address.view) ?? allowed()[0];
	shown?.abort();
	shown = new AbortController();
	for (const item of menu.querySelectorAll("a")) {
		mark(item, "aria-current", item.dataset.view === view.name ? "page" : null);
	}
	isBlind = Boolean(live.trouble);
	document.title = `${view.title} · inferencia`;
	mark(main, "data-view", view.name);
	fill(main, el("h1", { class: view.quiet ? "unseen" : null }, view.title));
	view.mount(main, { params: address.params, signal: shown.signal, session });
	scrollTo(0, 0);
}

addEventListener("hashchange", () => {
	if (location.hash === "#main") return;
	show();
	if (session) main.focus({ preventScroll: true });
});

// "#main" in the address would be taken for a view.
document.getElementById("skip").addEventListener("click", (event) => {
	event.preventDefault();
	main.focus();
});

// --- the line of truth ----------------------------------------------------------------

const field = (name) => document.getElementById(`t-${name}`);

/** Show only these of the figures that not everybody may know. */
function reveal(...names) {
	for (const name of ["rate", "flight", "waiting", "memory"]) field(name).parentElement.hidden = !names.includes(name);
}

function drawTruth() {
	const state = live.state;
	if (live.trouble) {
		health.update("no connection");
		mark(field("health"), "title", live.trouble);
		mark(document.getElementById("truth"), "data-old", "");
		return;
	}
	if (isBlind) show();
	mark(document.getElementById("truth"), "data-old", null);
	mark(field("health"), "title", null);
	if (!state) return;
	health.update(state.health);
	reveal("rate", "flight", "waiting", "memory");
	say(field("rate").previousElementSibling, "tokens/s");
	say(field("rate"), rate(state.rates.completion));
	say(field("flight"), whole(state.in_flight));
	say(field("waiting"), whole(state.waiting.total));
	const { used, budget } = state.memory ?? {};
	say(field("memory"), budget ? bytesOf(used, budget) : bytes(used));
	say(field("version"), state.version);
}

/** For those who are not told by the stream: ask now and then. */
async function followHealth() {
	const isTold = () => session?.role === "admin";
	for (;;) {
		if (!isTold()) await askHealth(isTold).catch(() => isTold() || health.update("no connection"));
		await pause(10_000);
	}
}

async function askHealth(isTold) {
	const ready = await fetch(root("health/ready"), { cache: "no-store" });
	const { version } = await (await fetch(root("version"))).json();
	const mine = session?.role === "user" ? await (await ask(root("v1/usage"))).json() : null;
	if (isTold()) return; // in the meantime
	health.update(ready.ok ? "ready" : "unavailable");
	say(field("version"), version);
	reveal(mine?.today && "rate");
	if (!mine?.today) return;
	say(field("rate").previousElementSibling, "tokens today");
	say(field("rate"), short(mine.today.total_tokens));
}

// --- the keyboard ---------------------------------------------------------------------

const QUIET = "inferencia-no-shortcuts";
let lastG = -Infinity; // ms

function isTyping(target) {
	return target.closest?.("input, textarea, select, [contenteditable]") !== null;
}

document.addEventListener("keydown", (event) => {
	if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
	if (event.key === "Escape") {
		if (!help.hidden) toggleHelp();
		else if (isTyping(event.target)) event.target.blur();
		return;
	}
	if (isTyping(event.target) || localStorage.getItem(QUIET)) return;
	if (event.timeStamp - lastG < 1500) {
		lastG = -Infinity;
		const view = allowed().find(({ letter }) => letter === event.key);
		if (view) {
			event.preventDefault();
			location.hash = link(view.name);
		}
		return;
	}
	if (event.key === "g") lastG = event.timeStamp;
	else if (event.key === "?") toggleHelp();
	else if (event.key === "/") {
		const filter = main.querySelector("[data-filter]");
		if (!filter) return;
		event.preventDefault();
		filter.focus();
		filter.select();
	}
});

function toggleHelp() {
	help.hidden = !help.hidden;
	if (help.hidden) {
		main.focus({ preventScroll: true });
		return;
	}
	const row = (keys, words) => [el("dt", {}, keys.map((key) => el("kbd", {}, key))), el("dd", {}, words)];
	const off = el("input", { type: "checkbox", checked: !localStorage.getItem(QUIET), on: { change: () => {
		if (off.checked) localStorage.removeItem(QUIET);
		else localStorage.setItem(QUIET, "1");
	} } });
	const close = simpleButton("Close", toggleHelp, {});
	fill(help, el("h2", {}, "Keyboard"),
		el("dl", {}, row(["/"], "filter"), allowed().map((view) => row(["g", view.letter], view.title)),
			row(["?"], "this list"), row(["Esc"], "leave a field, close, take a question back")),
		el("label", { class: "check" }, off, "single keys do this"), close);
	close.focus();
}

// --- begin ----------------------------------------------------------------------------

fill(field("health"), health);
live.onChange(drawTruth);
followHealth();
const key = storedKey();
if (key === null) showEntrance("");
else enter(key).catch((error) => showEntrance(error.message));
