// Numbers, sizes and times as people read them. What is not known is an en dash.

export const UNKNOWN = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** 1 234 567, with a thin space between the thousands. */
export function whole(value) {
	if (!isNumber(value)) return UNKNOWN;
	return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

/** 950, 12.3k, 4.56M: three digits that count. */
export function short(value) {
	if (!isNumber(value)) return UNKNOWN;
	let rest = value;
	for (const unit of ["", "k", "M", "G"]) {
		if (Math.abs(rest) < 999.5 || unit === "G") return digits(rest, unit !== "") + unit;
		rest /= 1000;
	}
	return UNKNOWN;
}

function digits(value, isScaled) {
	const size = Math.abs(value);
	if (!isScaled) return Number.isInteger(value) ? `${value}` : value.toFixed(size < 10 ? 1 : 0);
	return value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
}

/** Tokens in a second. */
export function rate(value) {
	if (!isNumber(value)) return UNKNOWN;
	return value > 0 && value < 9.95 ? value.toFixed(1) : whole(value);
}

/** 8.5 GiB. */
export function bytes(value) {
	if (!isNumber(value)) return UNKNOWN;
	let rest = value;
	for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
		if (rest < 1000 || unit === "TiB") {
			return `${unit === "B" ? Math.round(rest) : rest.toFixed(rest < 99.95 ? 1 : 0)} ${unit}`;
		}
		rest /= 1024;
	}
	return UNKNOWN;
}

/** 8.5 of 21.0 GiB, in the unit of the whole. */
export function bytesOf(part, all) {
	const [number, unit] = bytes(all).split(" ");
	const size = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].indexOf(unit);
	return `${part ? (part / size).toFixed(1) : 0} of ${number} ${unit}`;
}

/** 0.31 s, 12 s, 4 min 10 s, 3 h 5 min, 12 d. */
export function span(seconds) {
	if (!isNumber(seconds)) return UNKNOWN;
	if (seconds < 0) return span(0);
	if (seconds < 1) return `${seconds.toFixed(2)} s`;
	if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
	const rounded = Math.round(seconds);
	if (rounded < 60) return `${rounded} s`;
	if (rounded < 3600) return two(rounded, 60, "min", 1, "s");
	if (rounded < 86400) return two(rounded, 3600, "h", 60, "min");
	return two(rounded, 86400, "d", 3600, "h");
}

function two(seconds, big, bigUnit, small, smallUnit) {
	const rest = Math.floor((seconds % big) / small);
	const first = `${Math.floor(seconds / big)} ${bigUnit}`;
	return rest ? `${first} ${rest} ${smallUnit}` : first;
}

/** Whole seconds, so that a figure which runs does not change its width. */
export function age(seconds) {
	if (!isNumber(seconds)) return UNKNOWN;
	const passed = Math.max(0, Math.floor(seconds));
	return passed < 60 ? `${passed} s` : span(passed);
}

export function percent(share) {
	return isNumber(share) ? `${Math.round(share * 100)} %` : UNKNOWN;
}

export function money(value) {
	if (!isNumber(value)) return UNKNOWN;
	return value && Math.abs(value) < 0.01 ? value.toFixed(5) : value.toFixed(2);
}

const CLOCK = new Intl.DateTimeFormat([], { timeStyle: "medium", hourCycle: "h23" });

/** A moment (seconds since 1970) in this place's time. */
export function moment(seconds) {
	if (!isNumber(seconds)) return UNKNOWN;
	const date = new Date(seconds * 1000);
	const clock = CLOCK.format(date);
	const isToday = date.toDateString() === new Date().toDateString();
	return isToday ? clock : `${date.toLocaleDateString()} ${clock}`;
}

/** "1 request", "2 requests". */
export const plural = (count, one, many = `${one}s`) =>
	`${whole(count)} ${count === 1 ? one : many}`;
