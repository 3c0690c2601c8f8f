// Keys: create, change their limits, rotate, revoke. A secret is shown once.

import { call, get, inPath, pause, storeKey } from "../api.js";
import * as live from "../live.js";
import { short, whole } from "../format.js";
import { bar, byRow, stateMark } from "../marks.js";
import { announce, copyButton, curl, press, snippet } from "../press.js";
import { Table, csvButton, filterField } from "../table.js";
import { VERBATIM, el, fill, inline, say, simpleButton } from "../text.js";

export const view = { name: "keys", letter: "k", title: "Keys", mount };

const EVERY = 10_000; // ms; the stream tells of other keys, not of what they use

const ROLES = ["user", "admin", "agent", "metrics"];
// name, label, hint, kind
const LIMITS = [
	["models", "Models", "globs, separated by commas; empty = all", "text"],
	["rps", "Requests a second", "empty = the gateway's default", "number"],
	["burst", "Burst", "requests at once", "number"],
	["concurrency", "At the same time", "empty = no limit", "number"],
	["tpm", "Tokens a minute", "empty = no limit", "number"],
	["daily_tokens", "Tokens a day", "empty = no limit", "number"],
	["priority", "Priority", "higher is served first", "number"],
	["expires", "Expires", "2027-01-31 or 30d; empty = never", "text"],
];

function mount(main, { params, signal }) {
	const secret = el("section", { class: "secret", "aria-live": "polite", hidden: true });
	const problem = el("p", { class: "bad", role: "alert" });
	const where = el("p", { class: "hint" });
	const table = keyTable(params, signal, { refresh, show });
	const creating = creation({ refresh, show });
	main.append(secret, problem,
		el("div", { class: "tools" }, filterField(table, params, "Filter keys"), creating.button, csvButton(table, "keys")),
		creating.form, table.node, where);

	function show(name, text) {
		fill(secret,
			el("h2", {}, `The secret of ${inline(name)}`),
			el("p", {}, "It is shown this once; only its digest is stored."),
			el("div", { class: "snippet" }, el("pre", { tabindex: "0", role: "region", "aria-label": "Secret" }, el("code", { id: "secret" }, text)), copyButton(text, "Copy the secret")),
			snippet(curl(null, text), "Command that asks a model with it"),
			simpleButton("I have it", () => { fill(secret); secret.hidden = true; }, {}));
		secret.hidden = false;
		secret.scrollIntoView({ block: "nearest" });
		announce(`key ${inline(name)} has a new secret; it is shown on top`);
	}

	async function refresh() {
		const answer = await get("keys", signal);
		say(problem, answer.problem ? inline(answer.problem) : "");
		say(where, answer.path ? `In ${inline(answer.path)}` : "");
		table.empty = el("p", {}, "No key yet. Create one above, or: inferencia keys add NAME");
		table.update(answer.keys);
	}

	async function look() {
		try {
			await refresh();
		} catch (error) {
			if (!signal.aborted) say(problem, error.message);
		}
	}

	let known;
	live.follow(signal, ({ keys }) => {
		if (known && known !== keys.changed) look();
		known = keys.changed;
	});
	(async () => {
		while (!signal.aborted) {
			await look();
			await pause(EVERY, signal);
		}
	})();
}

// --- the table ------------------------------------------------------------------------

function keyTable(params, signal, { refresh, show }) {
	const table = new Table({
		label: "Keys", narrow: 960, key: (row) => row.name, filter: params.filter, sort: params.sort ?? "name", signal,
		details: (row) => changing(row, { refresh, close: () => table.close(row.name) }),
		columns: [
			{ id: "name", label: "Name", value: (row) => row.name, name: true, wide: true },
			{ id: "role", label: "Role", value: (row) => row.role },
			{ id: "models", label: "Models", value: (row) => (row.models ?? []).join(", ") || "all", name: true, wide: true },
			{ id: "limits", label: "Limits", value: limitsOf, wide: true },
			{ id: "today", label: "Tokens today", numeric: "bar", value: (row) => row.tokens_today ?? 0, make: () => byRow(bar("Tokens today"), (row) => {
				const used = short(row.tokens_today);
				if (!row.daily_tokens) return [null, used];
				const share = row.tokens_today / row.daily_tokens;
				return [share, `${used} of ${short(row.daily_tokens)}`, share >= 1 ? "bad" : null];
			}) },
			{ id: "in_flight", label: "In flight", numeric: true, value: (row) => row.in_flight ?? 0, text: (row) => whole(row.in_flight ?? 0) },
			{ id: "expires", label: "Expires", value: (row) => row.expires, make: () => byRow(stateMark(""), (row) =>
				row.expired ? ["expired", `expired ${row.expires}`] : ["", row.expires ?? "never"]) },
			{ id: "do", label: "Change", quiet: true, bare: true, make: (row) => keyActions(row, { refresh, show }) },
		],
	});
	return table;
}

/** The limits that a key has of its own, in a few words. */
function limitsOf(row) {
	const parts = [[row.rps, "/s"], [row.concurrency, " at once"], [row.tpm, " tokens/min"]];
	return parts.filter(([value]) => typeof value === "number").map(([value, unit]) => short(value) + unit).join(", ") || null;
}

function keyActions(first, { refresh, show }) {
	if (!first.can_change) return el("span", { class: "hint" }, `from ${first.source === "state" ? "the first start" : inline(first.source)}`);
	const name = first.name;
	const rotate = press("Rotate", async () => {
		const { secret, is_own } = await call("POST", `keys/${inPath(name)}/rotate`, {});
		if (is_own) storeKey(secret);
		show(name, secret);
		await refresh();
	}, { question: "The old secret is void at once. Rotate?", yes: "Yes, rotate", describe: `Rotate the key ${inline(name)}` });
	const revoke = press("Revoke", async () => {
		await call("DELETE", `keys/${inPath(name)}`);
		announce(`${inline(name)} is revoked`);
		await refresh();
	}, { question: "Revoke it for good?", yes: "Yes, revoke", kind: "danger", describe: `Revoke the key ${inline(name)}` });
	return el("span", { class: "actions" }, rotate, revoke);
}

// --- forms ----------------------------------------------------------------------------

let serial = 0;

/** A form with a key's limits; `send(values)` says what to tell. */
function keyForm(label, row, { isNew = false, send, close }) {
	const inputs = new Map();
	const field = (name, title, input, hint) => {
		input.id = `key-${name}-${++serial}`;
		inputs.set(name, input);
		const tip = el("span", { class: "hint", id: `${input.id}-hint` }, hint);
		input.setAttribute("aria-describedby", tip.id);
		return el("div", { class: "field" }, el("label", { for: input.id }, title), input, tip);
	};
	const role = el("select", {}, ROLES.map((one) => el("option", { value: one, selected: one === (row.role ?? "user") }, one)));
	const told = el("p", { class: "result", role: "status" });
	const form = el("form", { class: "panel", "aria-label": label },
		el("div", { class: "fields" },
			isNew ? field("name", "Name", el("input", { required: true, ...VERBATIM }), "who or what uses it") : null,
			field("role", "Role", role, "what it may do"),
			LIMITS.map(([name, title, hint, kind]) => field(name, title, el("input", {
				type: kind, min: kind === "number" ? 0 : null, step: name === "rps" ? "any" : null,
				value: (name === "models" ? row.models?.join(", ") : row[name]) ?? "", ...VERBATIM,
			}), hint))),
		el("p", { class: "tools" }, el("button", { type: "submit", class: "strong" }, isNew ? "Create" : "Save"),
			simpleButton(isNew ? "Leave it" : "Leave it as it was", close)), told);
	form.addEventListener("submit", async (event) => {
		event.preventDefault();
		const values = {};
		for (const [name, input] of inputs) {
			const text = input.value.trim();
			if (text === "") values[name] = null;
			else if (name === "models") values[name] = text.split(/[\s,]+/).filter(Boolean);
			else values[name] = input.type === "number" ? Number(text) : text;
		}
		told.className = "result";
		try {
			say(told, await send(values));
		} catch (error) {
			told.className = "result bad";
			say(told, inline(error.message));
		}
	});
	return form;
}

function creation({ refresh, show }) {
	const place = el("div", { hidden: true });
	const button = simpleButton("New key", () => toggle(place.hidden), { "aria-expanded": "false" });
	function toggle(isOpen) {
		fill(place, isOpen ? keyForm("New key", {}, { isNew: true, send, close: () => toggle(false) }) : null);
		place.hidden = !isOpen;
		button.setAttribute("aria-expanded", String(isOpen));
		(isOpen ? place.querySelector("input") : button).focus();
	}
	async function send(values) {
		const asked = Object.entries(values).filter(([, value]) => value !== null);
		const made = await call("POST", "keys", Object.fromEntries(asked));
		show(made.key.name, made.secret);
		toggle(false);
		await refresh();
	}
	return { form: place, button };
}

function changing(row, { refresh, close }) {
	if (!row.can_change) {
		return el("p", { class: "hint" }, row.source === "state"
			? "Made at the first start. Keys of your own: write auth.keys_file into the configuration, or inferencia init."
			: `It comes from ${inline(row.source)} and is changed there.`);
	}
	const send = async (values) => {
		await call("PATCH", `keys/${inPath(row.name)}`, values);
		announce(`the limits of ${inline(row.name)} are saved`);
		await refresh();
		return "saved";
	};
	return keyForm(`Limits of ${inline(row.name)}`, row, { send, close });
}
