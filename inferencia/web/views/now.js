// Now: tokens per second, the requests in flight, models, machines, the host.

import { call, inPath } from "../api.js";
import { lane, timeline } from "../chart.js";
import { age, bytes, bytesOf, percent, plural, rate, short, span, whole } from "../format.js";
import * as live from "../live.js";
import { bar, byRow, stateMark } from "../marks.js";
import { actionsOf, modelState, stateOf } from "../modelrow.js";
import { curl, press, snippet } from "../press.js";
import { link } from "../router.js";
import { Table, filterField } from "../table.js";
import { el, fill, inline, mark, named, say } from "../text.js";

export const view = { name: "now", letter: "n", title: "Now", quiet: true, mount };

function mount(main, { params, signal }) {
	const completion = lane("Completion", "completion");
	const prompt = lane("Prompt", "prompt");
	const chart = el("section", { class: "charts", "aria-label": "Tokens per second" }, completion, prompt, timeline());
	const begin = el("section", { class: "begin", hidden: true });
	const requests = requestTable(params, signal);
	const models = modelTable(signal);
	const machines = el("section", { class: "side", hidden: true });
	const agents = agentTable(signal);
	const backends = backendTable(signal);
	const host = hostPanel();
	const notices = el("ul", { class: "notices", "aria-label": "Worth a look", "aria-live": "polite" });
	fill(machines, el("h2", {}, "Agents"), agents.node);
	const others = el("section", { class: "side" }, el("h2", {}, "Backends"), backends.node);
	main.append(notices, begin, chart,
		el("div", { class: "columns" },
			el("div", {}, el("section", {},
				el("div", { class: "head" }, el("h2", {}, "Requests"), filterField(requests, params, "Filter requests")), requests.node),
			machines, others),
			el("div", {}, el("section", {},
				el("div", { class: "head" }, el("h2", {}, "Models"), el("a", { class: "button", href: link("models") }, "All models")), models.node),
			host.node)));

	let isNew = null;
	live.follow(signal, (state) => {
		if (!state) return;
		const hasWorked = state.totals?.requests > 0 || state.usage?.rows > 0 || state.in_flight > 0;
		if (isNew !== !hasWorked) {
			isNew = !hasWorked;
			begin.hidden = !isNew;
			chart.hidden = isNew;
			if (isNew) fill(begin, firstSteps(state));
		}
		completion.update(state.history.completion);
		prompt.update(state.history.prompt);
		requests.update(state.requests ?? []);
		models.update(interesting(state.models ?? []));
		machines.hidden = !state.agents?.length;
		agents.update(state.agents ?? []);
		others.hidden = !state.backends?.length;
		backends.update(state.backends ?? []);
		host.update(state);
		const told = troubles(state);
		if (notices.dataset.told !== told.join("\n")) {
			notices.dataset.told = told.join("\n");
			fill(notices, told.map((text) => el("li", {}, stateMark("waiting", text))));
		}
	});
}

/** Models that run or could not; of those at rest only a few, used last. */
function interesting(models) {
	const busy = models.filter((model) => !["stopped", "remote", "broken"].includes(stateOf(model)));
	const idle = models
		.filter((model) => stateOf(model) === "stopped")
		.sort((one, other) => (other.last_used ?? 0) - (one.last_used ?? 0));
	return [...busy, ...idle.slice(0, Math.max(0, 6 - busy.length))];
}

function troubles(state) {
	const found = [...(state.config?.warnings ?? [])];
	if (state.usage?.degraded) found.push(`Usage cannot be written now: ${state.usage.degraded}`);
	for (const backend of state.backends ?? []) {
		if (backend.trouble) found.push(`${backend.name}: ${backend.trouble}`);
	}
	return found.map((text) => inline(text));
}

function firstSteps(state) {
	const model = (state.models ?? []).find(({ listed, state: is }) => listed !== false && is !== "broken")?.id;
	if (model === undefined) {
		return [
			el("h2", {}, "No model yet"),
			el("p", {}, "Fetch one, and it is here when it has come. ", el("a", { href: link("models") }, "Models"), " does the same with a progress bar."),
			snippet("inferencia models pull unsloth/Qwen3-0.6B-GGUF:Q4_K_M", "Command that fetches a model"),
		];
	}
	return [
		el("h2", {}, "All is ready. Say hello"),
		el("p", {}, "Nothing has been asked yet. From the first request on, the speed of the answers is drawn here. ",
			el("a", { href: link("playground", { model }) }, "Or try it in the playground.")),
		snippet(curl(model), "Command that asks a model"),
	];
}

// --- requests -------------------------------------------------------------------------

function requestTable(params, signal) {
	const table = new Table({
		label: "Requests in flight", narrow: 480, key: (row) => row.id, filter: params.filter, sort: params.sort ?? "", signal,
		columns: [
			{ id: "key", label: "Key, model", value: (row) => `${row.key ?? "–"}, ${row.model ?? "–"}`, make: () => {
				const who = el("bdi", {});
				const what = el("bdi", { class: "second" });
				return Object.assign(el("span", {}, who, what), { update: (row) => {
					say(who, inline(row.key ?? "no key"));
					say(what, inline(row.model ?? "–"));
				} });
			} },
			{ id: "state", label: "State", value: (row) => row.state, make: () => byRow(stateMark("waiting"), (row) =>
				[row.state, row.waits_for ? `waiting: ${inline(row.waits_for)}` : row.state]) },
			{ id: "tokens", label: "Tokens", numeric: true, value: (row) => row.completion_tokens ?? 0, text: (row) => whole(row.completion_tokens ?? 0) },
			{ id: "rate", label: "Tokens/s", numeric: true, value: (row) => row.tokens_per_second, text: (row) => rate(row.tokens_per_second) },
			{ id: "age", label: "Age", numeric: true, value: (row) => live.now() - row.began, text: (row) => age(live.now() - row.began) },
			{ id: "cancel", label: "Cancel", quiet: true, bare: true, make: (row) =>
				press("Cancel", () => call("DELETE", `requests/${inPath(row.id)}`).then(() => "cancelled"),
					{ question: "Cut this answer?", yes: "Yes, cancel", kind: "danger", describe: `Cancel the request of ${inline(row.key)} to ${inline(row.model)}` }) },
		],
	});
	table.empty = el("span", {}, "Nobody asks anything at the moment.");
	return table;
}

// --- models ---------------------------------------------------------------------------

function modelTable(signal) {
	const memory = (row) => row.memory ?? row.memory_estimated ?? null;
	const table = new Table({
		label: "Models on this machine", key: (row) => row.id, signal,
		columns: [
			{ id: "id", label: "Model", value: (row) => row.id, name: true, wide: true },
			{ id: "state", label: "State", value: stateOf, make: modelState },
			{ id: "memory", label: "Memory", numeric: "bar", value: memory, make: () => byRow(bar("Memory"), (row) => {
				const size = memory(row);
				const budget = live.state?.memory?.budget;
				const isIn = ["ready", "stopping", "loading"].includes(row.state);
				return [size === null ? null : budget && isIn ? size / budget : 0, size === null ? "–" : `${row.memory_measured ? "" : "≈ "}${bytes(size)}`];
			}) },
			{ id: "do", label: "Load or unload", quiet: true, bare: true, make: (row) => actionsOf(row) },
		],
	});
	table.empty = el("span", {}, "No model of this machine. ", el("a", { href: link("models") }, "Fetch or upload one."));
	return table;
}

// --- machines -------------------------------------------------------------------------

function agentTable(signal) {
	return new Table({
		label: "Agents", key: (row) => row.name, signal,
		columns: [
			{ id: "name", label: "Agent", value: (row) => row.name, name: true },
			{ id: "state", label: "State", value: (row) => row.state, make: () => byRow(stateMark(""), (row) => [row.state]) },
			{ id: "latency", label: "Latency", numeric: true, value: (row) => row.round_trip,
				text: ({ round_trip: seconds }) => (typeof seconds !== "number" ? "–" : seconds < 0.001 ? "< 1 ms" : `${Math.round(seconds * 1000)} ms`) },
			{ id: "active", label: "Active", numeric: true, value: (row) => row.active, text: (row) => `${whole(row.active)} of ${whole(row.max_streams)}` },
			{ id: "models", label: "Models", numeric: true, value: (row) => row.models?.length ?? 0, make: () => {
				const node = el("span", {});
				node.update = (row) => {
					say(node, whole(row.models?.length ?? 0));
					mark(node, "title", (row.models ?? []).map(inline).join("\n"));
				};
				return node;
			} },
		],
	});
}

function backendTable(signal) {
	return new Table({
		label: "Backends", key: (row) => row.name, signal,
		columns: [
			{ id: "name", label: "Backend", make: (row) => named(row.name, { title: inline(row.url ?? "") }), value: (row) => row.name },
			{ id: "state", label: "State", value: (row) => row.state, make: () => byRow(stateMark(""), (row) =>
				[row.state, row.breaker && row.breaker !== "closed" ? `${row.state}, breaker ${row.breaker}` : row.state]) },
			{ id: "type", label: "Type", value: (row) => row.type },
			{ id: "active", label: "In flight", numeric: true, value: (row) => row.in_flight, text: (row) => whole(row.in_flight) },
			{ id: "models", label: "Models", numeric: true, value: (row) => row.models, text: (row) => whole(row.models) },
		],
	});
}

// --- the host -------------------------------------------------------------------------

function hostPanel() {
	const title = el("h2", {}, "This machine");
	const rows = el("dl", { class: "host" });
	const bars = new Map();
	const row = (name, share, words) => {
		let one = bars.get(name);
		if (!one) {
			one = bar(name);
			bars.set(name, one);
			// Two and two stand beside each other: a card and its memory.
			if (bars.size % 2) rows.append(el("div", {}));
			rows.lastChild.append(el("div", {}, el("dt", {}, inline(name)), el("dd", {}, one)));
		}
		one.update(share, words);
	};
	const text = el("p", { class: "hint" });
	const node = el("section", { class: "side" }, title, rows, text);
	const update = (state) => {
		const host = state.host;
		if (!host) return;
		say(title, host.name ? `This machine: ${inline(host.name)}` : "This machine");
		row("CPU", host.cpu, `${percent(host.cpu)} of ${plural(host.cpus ?? 1, "core")}`);
		if (host.memory_total) row("Memory", host.memory_used / host.memory_total, bytesOf(host.memory_used, host.memory_total));
		const { budget, used } = state.memory ?? {};
		if (budget) row("Models", used / budget, bytesOf(used, budget));
		if (host.disk) row("Disk of the models", 1 - host.disk.free / host.disk.total, `${bytes(host.disk.free)} free of ${bytes(host.disk.total)}`);
		(host.gpus ?? []).forEach((gpu, number) => {
			const name = host.gpus.length > 1 ? `${number}: ${gpu.name}` : gpu.name;
			const details = [percent(gpu.use), gpu.temperature && `${Math.round(gpu.temperature)} °C`, gpu.power && `${Math.round(gpu.power)} W`];
			row(name, gpu.use, details.filter(Boolean).join(" · "));
			if (gpu.memory_total) row(host.gpus.length > 1 ? `Memory of card ${number}` : "Memory of the card", gpu.memory_used / gpu.memory_total, bytesOf(gpu.memory_used, gpu.memory_total));
		});
		const totals = state.totals ?? {};
		say(text, `Up for ${span(live.now() - state.started)} · ${plural(totals.requests ?? 0, "request")} · ${short(totals.prompt_tokens ?? 0)} tokens read, ${short(totals.completion_tokens ?? 0)} written`);
	};
	return { node, update };
}
