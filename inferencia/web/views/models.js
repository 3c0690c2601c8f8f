// Models: load, unload, fetch, upload, delete; what their files say.

import { call, get, inPath, pause, upload } from "../api.js";
import { bytes, moment, percent, plural, short, span, whole } from "../format.js";
import * as live from "../live.js";
import { bar, stateMark } from "../marks.js";
import { actionsOf, modelState, stateOf } from "../modelrow.js";
import { announce, press, snippet } from "../press.js";
import { link } from "../router.js";
import { Table, csvButton, filterField } from "../table.js";
import { VERBATIM, el, fill, inline, named, say } from "../text.js";

export const view = { name: "models", letter: "m", title: "Models", mount };

function mount(main, { params, signal }) {
	const table = modelTable(params, signal, refresh);
	const problems = el("ul", { class: "notices", "aria-label": "Files that are of no use" });
	const where = el("p", { class: "hint" });
	const downloads = downloadList();
	const come = el("div", { class: "two" }, downloadForm(), dropZone(signal, refresh));
	main.append(
		el("div", { class: "tools" }, filterField(table, params, "Filter models"), csvButton(table, "models")),
		table.node, problems,
		el("h2", {}, "Get more"), come, downloads.node, where);

	let details = new Map();
	let known = "";
	async function refresh() {
		const answer = await get("models", signal);
		details = new Map(answer.models.map((model) => [keyOf(model), model]));
		fill(problems, (answer.problems ?? []).map((text) => el("li", {}, stateMark("waiting", inline(text)))));
		say(where, answer.folders?.length ? `Folders: ${answer.folders.map(inline).join(", ")}` : "");
		table.empty = nothingYet();
		draw(live.state);
	}

	function draw(state) {
		if (!state) return;
		const states = new Map((state.models ?? []).map((model) => [keyOf(model), model]));
		// What the files say comes from the list, what changes from the stream.
		table.update([...states].map(([key, model]) => ({ ...details.get(key), ...model })));
		downloads.update(state.downloads ?? []);
		const names = [...states.keys()].sort().join("\n");
		if (known && known !== names) refresh().catch(() => {});
		known = names;
	}

	refresh().catch((error) => signal.aborted || fill(problems, el("li", {}, stateMark("failed", error.message))));
	live.follow(signal, draw);
}

const nothingYet = () =>
	el("div", {}, el("p", {}, "No model yet. Name one of Hugging Face's below, drop a GGUF file, or:"),
		snippet("inferencia models pull unsloth/Qwen3-0.6B-GGUF:Q4_K_M", "Command that fetches a model"));

/** Two backends may have a model of the same name. */
const keyOf = (model) => `${model.backend}/${model.id}`;

// --- the table ------------------------------------------------------------------------

function modelTable(params, signal, refresh) {
	const gguf = (row, member) => row.gguf?.[member] ?? null;
	return new Table({
		label: "Models", narrow: 880, key: keyOf, filter: params.filter, sort: params.sort ?? "id", signal,
		details: (row) => detailsOf(row, refresh),
		columns: [
			{ id: "id", label: "Model", value: (row) => row.id, name: true, wide: true },
			{ id: "where", label: "Where", value: (row) => row.backend, name: true },
			{ id: "state", label: "State", value: stateOf, make: modelState },
			{ id: "quantisation", label: "Quantisation", value: (row) => gguf(row, "quantisation"), text: (row) => gguf(row, "quantisation") ?? "–", name: true },
			{ id: "parameters", label: "Parameters", numeric: true, value: (row) => gguf(row, "parameters"), text: (row) => short(gguf(row, "parameters")) },
			{ id: "context", label: "Context", numeric: true, value: (row) => gguf(row, "context_length"), text: (row) => whole(gguf(row, "context_length")) },
			{ id: "size", label: "File", numeric: true, value: (row) => row.size ?? null, text: (row) => bytes(row.size) },
			{ id: "memory", label: "Memory", numeric: true, value: (row) => row.memory ?? row.memory_estimated ?? null,
				text: (row) => row.memory_measured || row.memory ? bytes(row.memory_measured ?? row.memory) : row.memory_estimated ? `≈ ${bytes(row.memory_estimated)}` : "–" },
			{ id: "do", label: "Load or unload", quiet: true, bare: true, make: (row) => actionsOf(row) },
		],
	});
}

function detailsOf(first, refresh) {
	const list = el("dl", { class: "details" });
	const tools = el("p", { class: "tools" },
		el("a", { class: "button", href: link("playground", { model: first.id }) }, "Chat with it"),
		el("a", { class: "button", href: link("logs", { source: first.id }) }, "Its log"));
	if (first.can_delete) {
		tools.append(press("Delete", async () => {
			const { deleted, size } = await call("DELETE", `models/${inPath(first.id)}`);
			announce(`${plural(deleted.length, "file")} deleted, ${bytes(size)} free`);
			await refresh();
			return `${plural(deleted.length, "file")} deleted, ${bytes(size)} free`;
		}, { question: `Delete ${bytes(first.size)} from the disk for good?`, yes: "Yes, delete", kind: "danger", describe: `Delete ${inline(first.id)}` }));
	}
	const node = el("div", {}, list, tools);
	const put = (entries) => {
		const told = JSON.stringify(entries);
		if (list.dataset.told === told) return;
		list.dataset.told = told;
		fill(list, entries.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, named(value)))));
	};
	node.update = (row) => {
		const file = row.gguf ?? {};
		put([
			["Why it failed", row.error], ["File", row.path], ["Projector", row.mmproj], ["Flags", row.flags], ["Command", row.command],
			["Found by", row.origin], ["Name in the file", file.name], ["Kind", file.kind], ["Architecture", file.architecture],
			["Parameters", file.parameters && whole(file.parameters)], ["Layers", file.block_count],
			["Embedding length", file.embedding_length && whole(file.embedding_length)], ["Vocabulary", file.vocabulary && whole(file.vocabulary)],
			["Chat template", file.has_template === undefined ? null : file.has_template ? "in the file" : "none in the file"],
			["Loaded", row.loaded_since && moment(row.loaded_since)], ["Took to load", row.load_seconds && span(row.load_seconds)],
			["Last used", row.last_used && moment(row.last_used)], ["Unloaded when idle for", row.ttl && span(row.ttl)],
		].filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== 0));
	};
	node.update(first);
	return node;
}

// --- downloads ------------------------------------------------------------------------

function downloadForm() {
	const input = el("input", { id: "fetch", placeholder: "owner/name-GGUF:Q4_K_M", ...VERBATIM, required: true });
	const button = el("button", { type: "submit" }, "Fetch");
	const told = el("p", { class: "result", role: "status" });
	const form = el("form", { class: "fetch" },
		el("label", { for: "fetch" }, "From Hugging Face"), el("div", { class: "row" }, input, button), told);
	form.addEventListener("submit", async (event) => {
		event.preventDefault();
		button.disabled = true;
		try {
			await call("POST", "downloads", { model: input.value.trim() });
			input.value = "";
			told.className = "result";
			say(told, "it has begun");
		} catch (error) {
			told.className = "result bad";
			say(told, error.message);
		}
		button.disabled = false;
	});
	return form;
}

/** What is on its way, as a row: a name, how it is, how far it is, and buttons. */
function onItsWay(name, state, ...buttons) {
	const is = stateMark(state);
	const progress = bar("Progress", { busy: true });
	const words = el("span", { class: "words" });
	const node = el("li", {}, el("span", { class: "name" }, named(name)), is, progress, words, el("span", { class: "actions" }, buttons));
	node.update = (word, share, text, told = word) => {
		is.update(word, told);
		progress.hidden = word !== "running";
		progress.update(share ?? 0, share === null ? "" : percent(share));
		say(words, inline(text));
	};
	return node;
}

function downloadList() {
	const node = el("ul", { class: "downloads", "aria-label": "Downloads" });
	const items = new Map();

	function make(first) {
		let row = first;
		const end = () => call("DELETE", `downloads/${inPath(row.id)}`).then(() => "");
		const stop = press("Cancel", end, { describe: `Cancel or clear the download of ${inline(row.model)}` });
		const again = press("Go on", async () => {
			await end();
			await call("POST", "downloads", { model: row.model });
		});
		const item = onItsWay(row.model, row.state, again, stop);
		return { item, update(now) {
			row = now;
			const isRunning = now.state === "running";
			item.update(now.state, now.size ? now.done / now.size : null, described(now), isRunning ? now.phase : now.state);
			stop.label(isRunning ? "Cancel" : "Clear");
			again.hidden = now.state !== "failed" && now.state !== "cancelled";
		} };
	}

	return {
		node,
		update(rows) {
			const seen = new Set(rows.map(({ id }) => id));
			for (const [id, { item }] of items) {
				if (!seen.has(id)) {
					item.remove();
					items.delete(id);
				}
			}
			for (const row of rows) {
				if (!items.has(row.id)) {
					items.set(row.id, make(row));
					node.append(items.get(row.id).item);
				}
				items.get(row.id).update(row);
			}
			node.hidden = !rows.length;
		},
	};
}

function described(row) {
	if (row.state === "failed") return row.error ?? "";
	if (row.state === "cancelled") return "what has come is kept; it can go on from there";
	if (row.state === "done") return row.path ?? "";
	const parts = [];
	if (row.files > 1) parts.push(`file ${row.number} of ${row.files}`);
	if (row.size) parts.push(`${bytes(row.done)} of ${bytes(row.size)}`);
	if (row.rate) parts.push(`${bytes(row.rate)}/s`);
	if (row.seconds_left) parts.push(`${span(row.seconds_left)} left`);
	if (row.note) parts.push(row.note);
	return parts.join(" · ");
}

// --- uploads --------------------------------------------------------------------------

function dropZone(signal, refresh) {
	const input = el("input", { type: "file", id: "upload", accept: ".gguf", multiple: true, class: "unseen" });
	const list = el("ul", { class: "downloads", "aria-label": "Uploads" });
	const zone = el("div", { class: "drop" },
		el("label", { for: "upload" }, el("strong", {}, "Drop a GGUF file here"), " or choose one"), input, list);
	const take = (files) => [...files].forEach((file) => list.append(oneUpload(file, refresh)));
	input.addEventListener("change", () => {
		take(input.files);
		input.value = "";
	});
	// A file that misses the zone must not replace the page.
	for (const event of ["dragover", "drop"]) {
		document.addEventListener(event, (dropped) => dropped.preventDefault(), { signal });
	}
	zone.addEventListener("dragover", () => zone.classList.add("over"));
	zone.addEventListener("dragleave", () => zone.classList.remove("over"));
	zone.addEventListener("drop", (event) => {
		zone.classList.remove("over");
		take(event.dataTransfer.files);
	});
	return zone;
}

function oneUpload(file, refresh, how = "") {
	const control = new AbortController();
	const cancel = press("Cancel", () => control.abort(), { question: "Nothing of it is kept. Cancel?", yes: "Yes, cancel", kind: "danger" });
	const clear = press("Clear", () => item.remove());
	const replace = press("Replace it", () => item.replaceWith(oneUpload(file, refresh, "?replace=true")), { kind: "danger" });
	clear.hidden = replace.hidden = true;
	const item = onItsWay(file.name, "running", cancel, replace, clear);
	const since = performance.now();
	const progress = (sent) => {
		const pace = (sent * 1000) / Math.max(performance.now() - since, 1);
		const left = pace ? ` · ${bytes(pace)}/s · ${span((file.size - sent) / pace)} left` : "";
		item.update("running", sent / (file.size || 1), `${bytes(sent)} of ${bytes(file.size)}${left}`, "sending");
	};
	progress(0);
	(async () => {
		try {
			const answer = await upload(`models/${inPath(file.name)}${how}`, file, { signal: control.signal, progress });
			item.update("done", 1, `${bytes(answer.size)} · ${answer.note ?? answer.model ?? answer.path}`);
			announce(`${inline(file.name)} is there`);
			await pause(300);
			refresh().catch(() => {});
		} catch (error) {
			item.update("failed", 0, error.message);
			replace.hidden = error.status !== 409 || how !== "";
		}
		cancel.hidden = true;
		clear.hidden = false;
	})();
	return item;
}
