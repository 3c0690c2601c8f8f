// Two charts of our own, in SVG: an area over the last minutes, and stacked bars by day.

import { el, inline, mark, say, svg } from "./text.js";
import { rate, short } from "./format.js";

const SECONDS = 300;

/** A round number, such as 5M. */
const round = (value) => short(value).replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");

/** The next round number that is not below. */
function roundUp(value) {
	const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
	return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/**
 * A lane of a chart over five minutes, one sample a second.
 * `update(values)` takes the samples, oldest first.
 */
export function lane(label, kind) {
	const area = svg("path", { class: `area ${kind}` });
	const line = svg("path", { class: `line ${kind}` });
	const rule = svg("path", { class: "rule", d: "M0 0H300M0 50H300M0 100H300" });
	const reading = svg("path", { class: "reading", d: "M0 0V100", visibility: "hidden" });
	const picture = svg("svg", { viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img" }, rule, area, line, reading);
	const top = el("span", { class: "scale" });
	const figure = el("strong", { class: "figure" }, "–");
	const when = el("span", { class: "when" }, "tokens/s now");
	const node = el("figure", { class: `lane ${kind}` },
		el("figcaption", {}, el("span", { class: "swatch", "aria-hidden": "true" }), el("span", {}, label), figure, when),
		el("div", { class: "plot" }, picture, top));
	let values = [];
	let place = null; // of the pointer, from 0 to 1

	function read() {
		const at = place === null ? values.length - 1 : Math.round(place * (SECONDS - 1)) - (SECONDS - values.length);
		say(figure, rate(values[at] ?? 0));
		const ago = values.length - 1 - at;
		say(when, ago > 0 ? `tokens/s, ${ago} s ago` : "tokens/s now");
		mark(reading, "visibility", place === null ? "hidden" : "visible");
		if (place !== null) mark(reading, "transform", `translate(${(place * SECONDS).toFixed(1)} 0)`);
	}

	picture.addEventListener("pointermove", (event) => {
		const box = picture.getBoundingClientRect();
		place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
		read();
	});
	picture.addEventListener("pointerleave", () => {
		place = null;
		read();
	});

	let told = 0;
	node.update = (samples) => {
		values = samples.slice(-SECONDS);
		const most = roundUp(Math.max(1, ...values));
		const first = SECONDS - values.length;
		const points = values.map((value, i) => `${first + i + 0.5} ${(100 - (value / most) * 96).toFixed(2)}`);
		const path = points.length ? `M${points.join("L")}` : "";
		mark(line, "d", path);
		mark(area, "d", path && `${path}L${SECONDS - 0.5} 100L${first + 0.5} 100Z`);
		say(top, round(most));
		read();
		if (Date.now() - told > 10_000) {
			// For those who do not see it; often enough, and not each second.
			told = Date.now();
			const mean = values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
			mark(picture, "aria-label",
				`${label} tokens per second over five minutes: ${rate(values.at(-1) ?? 0)} now, ${rate(mean)} on average, at most ${rate(Math.max(0, ...values))}`);
		}
	};
	return node;
}

/** The times below the lanes. */
export const timeline = () =>
	el("p", { class: "timeline", "aria-hidden": "true" },
		["5 min", "4", "3", "2", "1", "now"].map((text) => el("span", {}, text)));

/**
 * Stacked bars. `columns`: [{label, parts: [number]}] in the order of `names`.
 * Whoever cannot see it has the table below with the same numbers.
 */
export function stackedBars({ columns, names, shown, label }) {
	const sums = columns.map(({ parts }) => parts.reduce((sum, part) => sum + part, 0));
	const most = roundUp(Math.max(...sums, 1));
	const width = 1000 / Math.max(columns.length, 1);
	const gap = Math.min(width * 0.25, 8);
	const drawing = columns.map(({ label: day, parts }, place) => {
		let bottom = 300;
		const group = svg("g", {}, svg("rect", { class: "whole", x: place * width, y: 0, width, height: 300 }));
		parts.forEach((part, kind) => {
			const height = (part / most) * 290;
			if (!height) return;
			bottom -= height;
			group.append(svg("rect", { class: `s${kind}`, x: (place * width + gap / 2).toFixed(2), y: bottom.toFixed(2),
				width: (width - gap).toFixed(2), height: Math.max(height, 0.8).toFixed(2) }));
		});
		const lines = parts.map((part, kind) => (part ? `${inline(names[kind])}: ${shown(part)}` : "")).filter(Boolean);
		group.append(svg("title", {}, [`${day}: ${shown(sums[place])}`, ...lines].join("\n")));
		return group;
	});
	const picture = svg("svg", { viewBox: "0 0 1000 300", preserveAspectRatio: "none", role: "img", "aria-label": label },
		svg("path", { class: "rule", d: "M0 10H1000M0 155H1000M0 300H1000" }), drawing);
	const legend = el("ul", { class: "legend", "aria-label": "Colours" },
		names.map((name, kind) => el("li", {}, el("span", { class: `swatch s${kind}`, "aria-hidden": "true" }), el("bdi", {}, inline(name)))));
	// As many names of days as there is room for.
	const step = Math.ceil(columns.length / 8);
	const days = el("p", { class: "timeline days", "aria-hidden": "true" },
		columns.map(({ label: day }, place) => el("span", {}, (columns.length - 1 - place) % step ? "" : day)));
	return el("figure", { class: "bars" }, el("figcaption", { class: "hint", "aria-hidden": "true" }, label), legend,
		el("div", { class: "plot" }, picture, el("span", { class: "scale" }, shown === short ? round(most) : shown(most))), days);
}

