// Logs: the gateway's lines and each model's, as they come.

import { follow as followStream, within } from "../api.js";
import * as live from "../live.js";
import { moment } from "../format.js";
import { stateMark } from "../marks.js";
import { save } from "../press.js";
import { keep } from "../router.js";
import { VERBATIM, el, fill, inline, visible } from "../text.js";

export const view = { name: "logs", letter: "l", title: "Logs", mount };

const MOST_LINES = 2000;
// Lines that come faster are shown together: a browser lays all of them out each time.
const TOGETHER = 200; // ms
// What colours a terminal (ECMA-48, SGR) only disturbs here.
const COLOURS = /\u001b\[[0-9;]*m/g;
const LEVELS = ["debug", "info", "warning", "error"];
// What a line of the gateway's says first; all else follows as name=value.
const FIRST = new Set(["time", "ts", "level", "msg", "message", "logger"]);

function mount(main, { params, signal }) {
	const chosen = { source: params.source ?? "gateway", level: params.level ?? "debug", filter: params.filter ?? "" };
	const lines = el("ol", { class: "lines", tabindex: "0", "aria-label": "Lines", role: "log", "aria-live": "off" });
	const is = stateMark("connecting");
	const newest = el("button", { type: "button", class: "newest", hidden: true }, "To the newest");
	const source = el("select", { "aria-label": "Whose lines" });
	const level = el("select", { "aria-label": "At least" }, LEVELS.map((one, rank) => el("option", { value: one, selected: one === chosen.level }, rank ? `${one} and worse` : "all levels")));
	const filter = el("input", { type: "search", "aria-label": "Filter lines", placeholder: "Filter lines  /", "data-filter": "", value: chosen.filter, ...VERBATIM });
	const following = el("input", { type: "checkbox", checked: true });
	const none = el("p", { class: "none" }, "No such line so far; what comes is shown at once.");
	const saving = el("button", { type: "button", class: "end" }, "Save");
	main.append(el("div", { class: "tools" }, source, level, filter, el("label", { class: "check" }, following, "follow"), is, saving),
		el("div", { class: "log" }, lines, none, newest));

	let kept = []; // {raw, rank, node}
	let reading = null;

	// --- lines --------------------------------------------------------------------------

	const fits = (line) => {
		if (line.rank < LEVELS.indexOf(chosen.level)) return false;
		const words = chosen.filter.trim().toLowerCase().split(/\s+/).filter(Boolean);
		const text = line.raw.toLowerCase();
		return words.every((word) => text.includes(word));
	};

	let pending = "";
	let drawing = 0;

	function add(text) {
		pending += `${text}\n`;
		drawing ||= setTimeout(draw, kept.length ? TOGETHER : 0);
	}

	function draw() {
		const isAtEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
		const some = document.createDocumentFragment();
		for (const raw of pending.replace(COLOURS, "").split("\n").filter(Boolean).slice(-MOST_LINES)) {
			const line = understood(raw);
			line.node.hidden = !fits(line);
			kept.push(line);
			some.append(line.node);
		}
		pending = "";
		drawing = 0;
		lines.append(some);
		for (const line of kept.splice(0, Math.max(0, kept.length - MOST_LINES))) line.node.remove();
		tellNone();
		if (isAtEnd && following.checked) lines.scrollTop = lines.scrollHeight;
		else newest.hidden = false;
	}

	const tellNone = () => (none.hidden = kept.some(({ node }) => !node.hidden));

	function again() {
		for (const line of kept) line.node.hidden = !fits(line);
		tellNone();
		lines.scrollTop = lines.scrollHeight;
	}

	lines.addEventListener("scroll", () => {
		if (lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40) newest.hidden = true;
	});
	newest.addEventListener("click", () => {
		lines.scrollTop = lines.scrollHeight;
		newest.hidden = true;
	});

	// --- which --------------------------------------------------------------------------

	function read() {
		reading?.abort();
		reading = within(signal);
		kept = [];
		pending = "";
		fill(lines);
		is.update("connecting");
		const path = `logs?${new URLSearchParams({ source: chosen.source, follow: "1" })}`;
		let isNew = true;
		followStream(path, {
			signal: reading.signal,
			silence: 0,
			told({ data }) {
				if (isNew) {
					// After a break the last lines come again.
					isNew = false;
					kept = [];
					pending = "";
					fill(lines);
					is.update("active", "live");
				}
				add(JSON.parse(data));
			},
			lost(error) {
				isNew = true;
				is.update(error ? "failed" : "connecting", error ? inline(error.message) : "connecting");
			},
		});
	}

	function drawSources(state) {
		const models = (state?.models ?? []).filter(({ backend }) => backend === "local").map(({ id }) => id).sort();
		const names = ["gateway", "models", ...models];
		if (!names.includes(chosen.source)) names.push(chosen.source);
		const told = names.join("\n");
		if (source.dataset.told === told) return;
		source.dataset.told = told;
		fill(source, names.map((name) => el("option", { value: name, selected: name === chosen.source },
			name === "gateway" ? "the gateway" : name === "models" ? "all models" : inline(name))));
	}

	source.addEventListener("change", () => {
		chosen.source = source.value;
		keep({ source: chosen.source });
		read();
	});
	level.addEventListener("change", () => {
		chosen.level = level.value;
		keep({ level: chosen.level === "debug" ? "" : chosen.level });
		again();
	});
	filter.addEventListener("input", () => {
		chosen.filter = filter.value;
		keep({ filter: chosen.filter });
		again();
	});
	following.addEventListener("change", () => {
		if (following.checked) read();
		else {
			reading.abort();
			is.update("stopped", "paused");
		}
	});
	saving.addEventListener("click", () => {
		const text = kept.filter(({ node }) => !node.hidden).map(({ raw }) => `${raw}\n`).join("");
		save(`${chosen.source.replace(/[^\w.-]+/g, "-")}.log`, text, "text/plain");
	});
	drawSources(live.state);
	live.follow(signal, drawSources);
	read();
}

/** A line, as JSON if it is that: when, how bad, what, and the rest. */
function understood(raw) {
	let record = null;
	if (raw.startsWith("{")) {
		try {
			record = JSON.parse(raw);
		} catch {
			// then it is a line like any other
		}
	}
	if (record === null) {
		const rank = /\b(error|failed|fatal|traceback)\b/i.test(raw) ? 3 : /\bwarn(ing)?\b/i.test(raw) ? 2 : 1;
		return { raw, rank, node: el("li", { "data-level": LEVELS[rank] }, visible(raw)) };
	}
	const name = String(record.level ?? "info").toLowerCase().replace(/^warn$/, "warning").replace(/^critical$/, "error");
	const rank = Math.max(0, LEVELS.indexOf(name));
	const time = record.time ?? record.ts;
	const { id, ...others } = record;
	if (id) others.id = id; // last: it is long, and few look for it
	const rest = Object.entries(others).filter(([member]) => !FIRST.has(member));
	const node = el("li", { "data-level": name },
		el("time", {}, moment(typeof time === "number" ? time : Date.parse(time) / 1000)), " ",
		el("span", { class: "level" }, name), " ",
		el("strong", {}, inline(record.msg ?? record.message ?? "")), " ",
		el("span", { class: "rest" }, rest.map(([member, value]) => `${inline(member)}=${typeof value === "string" ? visible(value) : JSON.stringify(value)}`).join("  ")));
	return { raw, rank, node };
}
