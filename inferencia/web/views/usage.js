// Usage: stacked bars by day, and the numbers as a table.

import { ask, get, root } from "../api.js";
import { stackedBars } from "../chart.js";
import { money, plural, short, span, whole } from "../format.js";
import { curl, snippet } from "../press.js";
import { keep } from "../router.js";
import { Table, csvButton, filterField } from "../table.js";
import { el, fill, inline } from "../text.js";

export const view = { name: "usage", letter: "u", title: "Usage", forUsers: true, mount };

const SPANS = { "24h": "24 hours", "7d": "7 days", "30d": "30 days", "90d": "90 days", "400d": "400 days" };
const STEPS = { "24h": "hour", "400d": "week" };
const BY = { key: "by key", model: "by model", backend: "by backend" };
const MEASURES = { tokens: "tokens", requests: "requests", money: "money" };
// So many have a shade of their own; all others share the last.
const SHADES = 6;

function mount(main, { params, signal, session }) {
	if (session.role === "admin") mountAll(main, params, signal);
	else mountOwn(main, params, signal, session);
}

// --- everybody's ----------------------------------------------------------------------

function mountAll(main, params, signal) {
	const chosen = {
		by: BY[params.by] ? params.by : "key",
		since: SPANS[params.since] ? params.since : "30d",
		measure: MEASURES[params.measure] ? params.measure : "tokens",
	};
	const total = el("p", { class: "total" });
	const picture = el("div", {});
	const place = el("div", { class: "panel" });
	const tools = el("div", { class: "tools" },
		choice("Show", MEASURES, chosen.measure, (value) => change("measure", value)),
		choice("Sum up", BY, chosen.by, (value) => change("by", value)),
		choice("Since", SPANS, chosen.since, (value) => change("since", value)));
	main.append(tools, total, picture, place);

	function change(name, value) {
		chosen[name] = value;
		keep({ [name]: value });
		draw();
	}

	let drawing = 0;
	async function draw() {
		const mine = ++drawing;
		const { by, since, measure } = chosen;
		const step = STEPS[since] ?? "day";
		let series;
		let sums;
		try {
			[series, sums] = await Promise.all([
				get(`usage?by=${step},${by}&since=${since}`, signal),
				get(`usage?by=${by}&since=${since}`, signal),
			]);
		} catch (error) {
			if (!signal.aborted) fill(total, el("span", { class: "bad" }, error.message));
			return;
		}
		if (mine !== drawing) return;
		if (!sums.usage.is_on) {
			fill(total, "Usage is not written down: usage.path is off.");
			return;
		}
		fill(total, summary(sums.total), sums.usage.degraded ? el("span", { class: "bad" }, ` Not up to date: ${inline(sums.usage.degraded)}`) : null);
		fill(picture, sums.rows.length ? bars(series.rows, { by, step, since, measure }) : null);
		const table = usageTable(by, params, signal);
		table.empty = el("div", {}, el("p", {}, "Nothing was used in this time. The first request is counted at once:"),
			snippet(curl(), "Command that asks a model"));
		table.update(sums.rows);
		fill(place, el("div", { class: "tools" }, filterField(table, params, "Filter usage"), csvButton(table, `usage-by-${by}`)), table.node);
	}
	draw();
}

function choice(label, options, value, changed) {
	const select = el("select", { "aria-label": label },
		Object.entries(options).map(([name, words]) => el("option", { value: name, selected: name === value }, words)));
	select.addEventListener("change", () => changed(select.value));
	return select;
}

function summary(total) {
	const parts = [
		plural(total.requests, "request"),
		`${short(total.prompt_tokens)} tokens read`,
		`${short(total.completion_tokens)} written`,
	];
	if (total.failed) parts.push(`${whole(total.failed)} not answered whole`);
	if (total.estimated) parts.push(`${whole(total.estimated)} estimated`);
	if (total.spent) parts.push(`${money(total.spent)} spent`);
	if (total.saved) parts.push(`${money(total.saved)} saved`);
	return parts.join(" · ");
}

const measured = {
	tokens: (row) => row.total_tokens,
	requests: (row) => row.requests,
	money: (row) => row.spent + row.saved,
};

function bars(rows, { by, step, since, measure }) {
	const amount = measured[measure];
	const sums = new Map();
	for (const row of rows) sums.set(row[by], (sums.get(row[by]) ?? 0) + amount(row));
	const ranked = [...sums].sort(([, one], [, other]) => other - one).map(([name]) => name);
	const names = ranked.length > SHADES ? [...ranked.slice(0, SHADES - 1), "all others"] : ranked;
	const place = new Map(ranked.map((name, rank) => [name, Math.min(rank, names.length - 1)]));
	const columns = new Map(moments(step, since, rows).map((moment) => [moment, names.map(() => 0)]));
	for (const row of rows) {
		const parts = columns.get(row[step]);
		if (parts) parts[place.get(row[by])] += amount(row);
	}
	return stackedBars({
		columns: [...columns].map(([moment, parts]) => ({ label: step === "hour" ? moment.slice(11, 16) : moment.slice(5), parts })),
		names,
		shown: measure === "money" ? money : short,
		label: `${MEASURES[measure]} per ${step} (UTC), ${BY[by]}, last ${SPANS[since]}`,
	});
}

/** Each hour, day or week of the span, also those in which nothing was used. */
function moments(step, since, rows) {
	const day = 86_400_000;
	const length = { hour: day / 24, day, week: 7 * day }[step];
	const count = step === "hour" ? 24 : Math.ceil((parseInt(since, 10) * day) / length);
	// Weeks begin with Mondays; 1970 began with a Thursday.
	const monday = step === "week" ? 4 * day : 0;
	const last = Math.floor((Date.now() - monday) / length) * length + monday;
	const all = Array.from({ length: count }, (_, back) => named(step, last - (count - 1 - back) * length));
	const known = rows.map((row) => row[step]);
	const first = known.length ? known.reduce((one, other) => (one < other ? one : other)) : all[0];
	// A year in which only the last week was used is drawn as that week.
	const begin = all.findIndex((moment) => moment >= first);
	return all.slice(Math.max(0, Math.min(begin, count - 14)));
}

const named = (step, ms) => {
	const text = new Date(ms).toISOString();
	return step === "hour" ? `${text.slice(0, 13)}:00Z` : text.slice(0, 10);
};

function usageTable(by, params, signal) {
	const number = (id, label, text = whole) => ({ id, label, numeric: true, value: (row) => row[id] ?? 0, text: (row) => text(row[id] ?? 0) });
	return new Table({
		label: `Usage ${BY[by] ?? "by day"}`, narrow: 960, key: (row) => row[by], filter: params.filter, sort: params.sort ?? "-total_tokens", signal,
		columns: [
			{ id: by, label: by[0].toUpperCase() + by.slice(1), value: (row) => row[by], name: true, wide: true },
			number("requests", "Requests"), number("failed", "Failed"),
			number("prompt_tokens", "Prompt"), number("cached_tokens", "of it cached"), number("completion_tokens", "Completion"),
			number("total_tokens", "Tokens"), number("estimated", "Estimated"),
			{ id: "seconds", label: "Time", numeric: true, value: (row) => row.seconds ?? null, text: (row) => span(row.seconds) },
			number("spent", "Spent", money), number("saved", "Saved", money),
		],
	});
}

// --- a user's own ---------------------------------------------------------------------

async function mountOwn(main, params, signal, session) {
	const total = el("p", { class: "total" }, "…");
	main.append(el("p", { class: "hint" }, session.why ? inline(session.why) : ""), total);
	let mine;
	try {
		mine = await (await ask(root("v1/usage"), { signal })).json();
	} catch (error) {
		if (!signal.aborted) fill(total, el("span", { class: "bad" }, error.message));
		return;
	}
	fill(total, `Key ${inline(mine.key)}: `, summary(mine));
	if (!mine.requests) {
		main.append(el("p", {}, "Nothing was used yet. Any OpenAI client does; this one is on every machine:"),
			snippet(curl(), "Command that asks a model"));
		return;
	}
	if (mine.days?.length) main.append(ownBars(mine.days));
	const add = (title, by, rows) => {
		const table = usageTable(by, by === "model" ? params : {}, signal);
		table.update(rows);
		main.append(el("div", { class: "head" }, el("h2", {}, title), csvButton(table, `usage-by-${by}`)), table.node);
	};
	if (mine.models?.length) add("By model, 30 days", "model", mine.models);
	if (mine.days?.length) add("By day (UTC)", "day", mine.days);
}

function ownBars(rows) {
	const byDay = new Map(rows.map((row) => [row.day, row]));
	const columns = moments("day", "30d", rows).map((day) => {
		const row = byDay.get(day);
		return { label: day.slice(5), parts: [row?.completion_tokens ?? 0, row?.prompt_tokens ?? 0] };
	});
	return stackedBars({ columns, names: ["completion", "prompt"], shown: short, label: "tokens per day (UTC), last 30 days" });
}
