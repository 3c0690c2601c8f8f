// A table that is sorted, filtered by typing, changed in place and saved as CSV.
//
// Rows are known by a key and keep their elements, so that neither focus nor what is
// open gets lost. While the pointer or the focus is in the table nothing changes its
// place: new ones come last, and those that go under the pointer stay, dimmed.
//
// A column: {id, label, numeric, value(row), make(row)}; `numeric` may be "bar". `value` is what is sorted,
// filtered and saved; it is shown as text (by `text(row)` if that is there), unless
// `make` returns an element, whose `update(row)` is called from then on.

import { VERBATIM, el, fill, inline, mark, say, simpleButton } from "./text.js";
import { keep } from "./router.js";
import { save } from "./press.js";

// What makes a spreadsheet compute a cell (OWASP, CSV Injection).
const FORMULA = /^[=+\-@\t\r]/;

export class Table {
	#columns;
	#key;
	#details;
	#rows = new Map(); // key -> {row, node, cells, extra, gone}
	#order = [];
	#sort;
	#filter;
	#heads = new Map();
	#body = el("tbody", { role: "rowgroup" });
	#none = el("p", { class: "none" });
	#isHeld = false;
	#opened = new Set();

	/**
	 * @param label what the table is of
	 * @param columns see above
	 * @param key what a row is known by
	 * @param sort "id" or "-id"
	 * @param filter text that each row shown has
	 * @param details element (with `update`) that is shown below an opened row
	 * @param narrow room in pixels below which its rows become lists of what they say
	 */
	constructor({ label, columns, key, sort = "", filter = "", details, signal, narrow = 430 }) {
		this.#columns = columns;
		this.#key = key;
		this.#sort = sort;
		this.#filter = filter;
		this.#details = details;
		const head = el("tr", { role: "row" }, columns.map((column) => this.#head(column)));
		this.table = el("table", { role: "table", "aria-label": label },
			el("thead", { role: "rowgroup" }, head), this.#body);
		this.node = el("div", { class: "table" }, this.table, this.#none);
		new ResizeObserver(([{ contentRect }]) =>
			mark(this.node, "class", contentRect.width < narrow ? "table list" : "table")).observe(this.node);
		const held = () => {
			const isHeld = this.#body.matches(":hover") || this.#body.contains(document.activeElement);
			if (this.#isHeld && !isHeld) {
				this.#isHeld = false;
				this.#arrange();
			}
			this.#isHeld = isHeld;
		};
		for (const event of ["pointerenter", "pointerleave", "focusin", "focusout"]) {
			this.#body.addEventListener(event, () => setTimeout(held), { signal });
		}
	}

	/** Show these rows. */
	update(rows) {
		const seen = new Set();
		for (const row of rows) {
			const key = this.#key(row);
			seen.add(key);
			const here = this.#rows.get(key);
			if (here) {
				here.row = row;
				here.gone = false;
				this.#draw(here);
			} else {
				this.#rows.set(key, this.#make(row));
			}
		}
		for (const [key, entry] of this.#rows) entry.gone = !seen.has(key);
		this.#arrange();
	}

	filter(text) {
		this.#filter = text;
		this.#arrange(true);
	}

	/** What is said where there are no rows; what matches no filter is said anyway. */
	set empty(node) {
		this.emptyNode = node;
		this.#arrange();
	}

	get size() {
		return [...this.#rows.values()].filter((entry) => !entry.gone).length;
	}

	/** What is shown, as CSV (RFC 4180). */
	csv() {
		const columns = this.#columns.filter((column) => column.value);
		const lines = [columns.map((column) => column.id)];
		for (const key of this.#order) {
			const { row } = this.#rows.get(key);
			lines.push(columns.map((column) => column.value(row)));
		}
		return lines.map((cells) => cells.map(cell).join(",")).join("\r\n") + "\r\n";
	}

	#head(column) {
		const attributes = { role: "columnheader", scope: "col", class: column.numeric === true ? "number" : null };
		if (!column.value) return el("th", attributes, el("span", { class: column.quiet ? "unseen" : null }, column.label));
		const button = el("button", { type: "button", class: "sort", on: { click: () => this.#sortBy(column) } },
			column.label, el("span", { class: "arrow", "aria-hidden": "true" }));
		const head = el("th", attributes, button);
		this.#heads.set(column.id, head);
		return head;
	}

	#sortBy(column) {
		const down = this.#sort === `-${column.id}`;
		const up = this.#sort === column.id;
		// What is counted is looked at from the top.
		if (column.numeric) this.#sort = down ? column.id : `-${column.id}`;
		else this.#sort = up ? `-${column.id}` : column.id;
		keep({ sort: this.#sort });
		this.#arrange(true);
	}

	#make(row) {
		const cells = this.#columns.map((column, place) => {
			const made = column.make?.(row);
			const attributes = { role: place ? "cell" : "rowheader", "data-label": column.label,
				class: [column.numeric === true && "number", column.wide && "wide", column.bare && "bare"].filter(Boolean).join(" ") || null };
			if (!place) attributes.scope = "row";
			return { made, node: el(place ? "td" : "th", attributes, made ?? el("span", {})) };
		});
		const node = el("tr", { role: "row" }, cells.map((one) => one.node));
		const entry = { row, node, cells, gone: false, extra: null };
		if (this.#details) this.#addOpener(entry);
		this.#draw(entry);
		return entry;
	}

	#addOpener(entry) {
		const button = el("button", { type: "button", class: "opener", "aria-expanded": "false",
			"aria-label": `Details of ${inline(this.#columns[0].value(entry.row))}` });
		button.addEventListener("click", () => {
			const isOpen = !entry.extra;
			mark(button, "aria-expanded", String(isOpen));
			if (isOpen) {
				entry.made = this.#details(entry.row);
				entry.extra = el("tr", { role: "row", class: "extra" },
					el("td", { role: "cell", colspan: this.#columns.length }, entry.made));
				entry.node.after(entry.extra);
			} else {
				entry.extra.remove();
				entry.extra = null;
			}
		});
		entry.cells[0].node.prepend(button);
		entry.opener = button;
	}

	/** Open the row of a key, as if its button had been pressed. */
	open(key) {
		const entry = this.#rows.get(key);
		if (entry && !entry.extra) entry.opener.click();
		return entry?.extra;
	}

	close(key) {
		const entry = this.#rows.get(key);
		if (entry?.extra) entry.opener.click();
		entry?.opener.focus();
	}

	#draw(entry) {
		this.#columns.forEach((column, place) => {
			const { made, node } = entry.cells[place];
			if (made) made.update?.(entry.row);
			else {
				const value = column.text ? column.text(entry.row) : column.value(entry.row) ?? "–";
				say(node.lastChild, column.name ? inline(value) : value);
				mark(node, "data-none", value === "–" ? "" : null);
			}
		});
		entry.made?.update?.(entry.row);
	}

	#arrange(isAsked = false) {
		const words = this.#filter.trim().toLowerCase().split(/\s+/).filter(Boolean);
		const fits = ({ row }) => {
			if (!words.length) return true;
			const text = this.#columns.map((column) => column.value?.(row) ?? "").join(" ").toLowerCase();
			return words.every((word) => text.includes(word));
		};
		const isHeld = this.#isHeld && !isAsked;
		for (const [key, entry] of this.#rows) {
			mark(entry.node, "class", entry.gone ? "gone" : null);
			entry.node.inert = entry.gone;
			if (entry.gone && !(isHeld && this.#body.matches(":hover"))) {
				if (entry.node.contains(document.activeElement)) this.#focusNear(entry.node);
				entry.node.remove();
				entry.extra?.remove();
				this.#rows.delete(key);
			}
		}
		const wanted = [...this.#rows].filter(([, entry]) => fits(entry)).map(([key]) => key);
		if (isHeld) {
			const before = this.#order.filter((key) => this.#rows.has(key));
			this.#order = [...before, ...wanted.filter((key) => !before.includes(key))];
		} else {
			this.#order = this.#sorted(wanted);
		}
		this.#place();
		for (const [id, head] of this.#heads) {
			const way = this.#sort === id ? "ascending" : this.#sort === `-${id}` ? "descending" : null;
			mark(head, "aria-sort", way);
		}
		this.table.hidden = !this.#rows.size;
		const isEmpty = !this.#order.length;
		this.#none.hidden = !isEmpty;
		if (!isEmpty) fill(this.#none);
		else if (this.#rows.size) fill(this.#none, `nothing here has “${inline(this.#filter.trim())}” in it`);
		else if (this.emptyNode && this.#none.firstChild !== this.emptyNode) fill(this.#none, this.emptyNode);
	}

	/** Whoever works in a row that goes finds himself in the one beside it. */
	#focusNear(node) {
		const near = node.nextElementSibling ?? node.previousElementSibling;
		near?.querySelector("button:not([hidden])")?.focus();
	}

	#sorted(keys) {
		const id = this.#sort.replace(/^-/, "");
		const column = this.#columns.find((one) => one.id === id && one.value);
		if (!column) return keys;
		const way = this.#sort.startsWith("-") ? -1 : 1;
		const value = (key) => column.value(this.#rows.get(key).row);
		return keys
			.map((key) => [key, value(key)])
			.sort(([, one], [, other]) => way * compared(one, other))
			.map(([key]) => key);
	}

	/** Put the rows into their order, and touch none that is in its place. */
	#place() {
		let next = this.#body.firstChild;
		const put = (node) => {
			if (node === next) next = next.nextSibling;
			else this.#body.insertBefore(node, next);
		};
		const shown = new Set(this.#order);
		for (const [key, entry] of this.#rows) {
			if (shown.has(key)) continue;
			if (entry.node === next) next = next.nextSibling;
			entry.node.remove();
			if (entry.extra && entry.extra === next) next = next.nextSibling;
			entry.extra?.remove();
		}
		for (const key of this.#order) {
			const { node, extra } = this.#rows.get(key);
			put(node);
			if (extra) put(extra);
		}
	}
}

function compared(one, other) {
	const isNothing = (value) => value === null || value === undefined || value === "";
	if (isNothing(one) || isNothing(other)) return isNothing(one) - isNothing(other);
	if (typeof one === "number" && typeof other === "number") return one - other;
	return String(one).localeCompare(String(other), undefined, { numeric: true });
}

function cell(value) {
	if (typeof value === "number") return String(value);
	let text = String(value ?? "");
	if (FORMULA.test(text)) text = `'${text}`;
	return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

/** A field that filters a table as one types; `/` goes to it. */
export function filterField(table, params, label = "Filter") {
	const input = el("input", { type: "search", "aria-label": label, placeholder: `${label}  /`, "data-filter": "",
		value: params.filter ?? "", ...VERBATIM });
	input.addEventListener("input", () => {
		keep({ filter: input.value });
		table.filter(input.value);
	});
	return input;
}

/** A button that saves what a table shows. */
export function csvButton(table, name) {
	return simpleButton("Save as CSV", () => save(`${name}.csv`, table.csv(), "text/csv"), { class: "end" });
}
