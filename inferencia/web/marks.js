// States as a shape, a colour and a word: never as a colour alone. Bars, too.

import { el, mark, say, svg } from "./text.js";
import { percent } from "./format.js";

const SHAPES = {
	full: () => svg("circle", { cx: 5, cy: 5, r: 4 }),
	half: () => svg("g", {}, svg("circle", { class: "hollow", cx: 5, cy: 5, r: 4 }), svg("path", { d: "M5 1a4 4 0 0 1 0 8z" })),
	ring: () => svg("circle", { class: "hollow", cx: 5, cy: 5, r: 3.6 }),
	triangle: () => svg("path", { d: "M5 .6 9.8 9.4H.2z" }),
	diamond: () => svg("path", { d: "M5 .4 9.6 5 5 9.6.4 5z" }),
};

// word -> [shape, meaning]
const STATES = {
	ready: ["full", "good"], up: ["full", "good"], active: ["full", "good"], done: ["full", "good"],
	answering: ["full", "good"],
	loading: ["half", "wait"], queued: ["half", "wait"], stopping: ["half", "wait"],
	running: ["half", "wait"], waiting: ["half", "wait"], draining: ["half", "wait"],
	connecting: ["half", "wait"],
	failed: ["triangle", "bad"], broken: ["triangle", "bad"], down: ["triangle", "bad"],
	unavailable: ["triangle", "bad"], "no connection": ["triangle", "bad"], expired: ["triangle", "bad"],
	remote: ["diamond", "off"],
};

/** A state; `update(word, text)` changes it in place. "" is a text without a mark. */
export function stateMark(word, text = word) {
	const node = el("span", { class: "state" });
	let shown;
	node.update = (next, words = next) => {
		if (next !== shown) {
			const [shape, meaning] = next === "" ? [null, null] : STATES[next] ?? ["ring", "off"];
			node.replaceChildren(
				shape ? svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, SHAPES[shape]()) : "",
				el("span"));
			mark(node, "data-means", meaning);
			shown = next;
		}
		say(node.lastChild, words);
	};
	node.update(word, text);
	return node;
}

/** A horizontal bar from 0 to 1; `update(share, words)` changes it in place. */
export function bar(label, { busy = false } = {}) {
	const fillRect = svg("rect", { class: "filled", x: 0, y: 0, width: 0, height: 1 });
	const box = svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, fillRect);
	const words = el("span", { class: "words" });
	const node = el("span", { class: busy ? "bar busy" : "bar", role: busy ? "progressbar" : "meter", "aria-label": label,
		"aria-valuemin": 0, "aria-valuemax": 100 }, words, box);
	node.update = (share, text, means) => {
		const known = typeof share === "number" && Number.isFinite(share);
		const kept = known ? Math.min(1, Math.max(0, share)) : 0;
		mark(fillRect, "width", kept.toFixed(4));
		mark(node, "aria-valuenow", Math.round(kept * 100));
		mark(node, "aria-valuetext", text ?? percent(share));
		mark(node, "data-means", means);
		mark(box, "class", known ? null : "nothing");
		say(words, text ?? percent(share));
	};
	return node;
}

/** A mark or a bar as a cell: `words(row)` is what its `update` is given. */
export function byRow(node, words) {
	const update = node.update;
	node.update = (row) => update(...words(row));
	return node;
}
