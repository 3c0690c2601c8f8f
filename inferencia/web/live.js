// The state of the gateway, kept up to date by one stream of events for the whole page.

import { follow as followStream } from "./api.js";

const HISTORY = 300; // seconds that the chart shows

/** What is known; null before the first event. */
export let state = null;
/** What is wrong with the stream; null while it runs. */
export let trouble = null;

const followers = new Set();
let running = null;
let offset = 0; // this machine's clock less the gateway's, in seconds

/** The gateway's time now, in seconds since 1970. */
export const now = () => Date.now() / 1000 - offset;

/** Have `told` called now (if there is a state) and at each change, until `signal`. */
export function follow(signal, told) {
	if (signal.aborted) return;
	followers.add(told);
	signal.addEventListener("abort", () => followers.delete(told), { once: true });
	if (state) told(state);
}

/** The same for the page itself, which never ends. */
export function onChange(told) {
	followers.add(told);
}

export function start() {
	if (running) return;
	running = new AbortController();
	followStream("events", { signal: running.signal, told: take, lost });
}

/** Have no stream for a while; what is known stays. */
export function rest() {
	running?.abort();
	running = null;
}

export function stop() {
	rest();
	state = null;
	trouble = null;
}

function take({ event, data }) {
	const news = JSON.parse(data);
	if (event === "state" || state === null) {
		state = news;
		state.history ??= { prompt: [], completion: [] };
	} else {
		const history = state.history;
		Object.assign(state, news, { history });
		for (const name of ["prompt", "completion"]) {
			history[name].push(news.rates?.[name] ?? 0);
			if (history[name].length > HISTORY) history[name].shift();
		}
	}
	offset = Date.now() / 1000 - state.time;
	trouble = null;
	tell();
}

function lost(error) {
	trouble = error?.message ?? "the gateway has ended the connection";
	tell();
}

function tell() {
	for (const told of [...followers]) told(state);
}
