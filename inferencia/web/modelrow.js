// A model as a row shows it, in more than one view: its state, and the button that loads
// or unloads it.

import { call, inPath } from "./api.js";
import { age, bytes, percent, plural } from "./format.js";
import * as live from "./live.js";
import { stateMark } from "./marks.js";
import { press } from "./press.js";
import { el, inline, mark, say } from "./text.js";

/** How a model is. What failed may be tried again soon, and is then "stopped": still it failed. */
export const stateOf = ({ state, error }) => (state === "stopped" && error ? "failed" : state);

/** The state of a model as a cell; what failed says why. */
export function modelState(row) {
	const is = stateMark(stateOf(row));
	const why = el("span", { class: "why" });
	const node = el("span", { class: "model-state" }, is, why);
	node.update = (now) => {
		const state = stateOf(now);
		is.update(state, state === "loading" && now.progress ? `loading ${percent(now.progress)}` : state);
		const error = state === "failed" || state === "broken" ? now.error : null;
		say(why, error ? inline(error) : now.waiting ? `${plural(now.waiting, "request")} waiting` : now.state === "ready" ? leaves(now) : "");
		mark(why, "title", error ? inline(error) : null);
	};
	return node;
}

/** When a model that is loaded goes. */
function leaves(row) {
	if (row.in_flight) return `in use by ${plural(row.in_flight, "request")}`;
	return row.unloads_at ? `unloads in ${age(row.unloads_at - live.now())}` : "stays loaded";
}

const isLocal = (row) => row.backend === "local";
const isIn = (row) => ["ready", "loading", "stopping", "queued"].includes(row.state);

/** Load or unload, as a button that says what it will do. */
export function actionsOf(first) {
	let row = first;
	const load = press("Load", () => call("POST", `models/${inPath(row.id)}/load`, { wait: false }).then(() => ""),
		{ describe: `Load ${inline(row.id)}` });
	const unload = press("Unload", () => call("POST", `models/${inPath(row.id)}/unload`, { wait: false }).then(() => ""), {
		describe: `Unload ${inline(row.id)}`,
		question: () => row.in_flight || row.waiting
			? `${plural(row.in_flight + row.waiting, "request")} would wait or be cut. Unload?` : "",
		yes: "Yes, unload",
	});
	const node = el("span", { class: "actions" }, load, unload);
	node.update = (now) => {
		row = now;
		const isHere = isIn(now);
		const hadFocus = node.contains(document.activeElement) && document.activeElement !== document.body;
		if (load.hidden !== (isHere || now.state === "broken" || !isLocal(now))) {
			load.hidden = isHere || now.state === "broken" || !isLocal(now);
			unload.hidden = !isHere;
			if (hadFocus) (isHere ? unload : load).button.focus();
		}
		const size = now.memory ?? now.memory_estimated;
		load.label(stateOf(now) === "failed" ? "Try again" : "Load");
		load.button.title = size ? `Takes about ${bytes(size)}` : "";
		unload.label(now.state === "loading" || now.state === "queued" ? "Stop loading" : "Unload");
		unload.button.title = size ? `Frees ${bytes(size)}` : "";
		unload.button.disabled = now.state === "stopping";
	};
	load.hidden = false;
	unload.hidden = true;
	return node;
}
