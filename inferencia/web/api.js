// The only way from this page to the gateway: calls, streams, uploads.
//
// Addresses are relative to this file, so that the page also works behind a proxy that
// serves it under another path. The key is kept in sessionStorage: in this tab only, and
// until it is closed.

const ADMIN = new URL("api/", import.meta.url);
const ROOT = new URL("../", import.meta.url);
const KEY = "inferencia-key";

/** A stream that has said nothing for so long is no stream any more, in ms. */
const SILENCE = 15_000;

/** An answer that is no success. `status` is 0 where nothing answered at all. */
export class ApiError extends Error {
	constructor(status, error = {}) {
		super(error.message ?? `the gateway answered ${status}`);
		this.status = status;
		this.code = error.code ?? "";
		this.problems = error.problems ?? [];
		this.protected = error.protected ?? [];
	}
}

export const storedKey = () => sessionStorage.getItem(KEY);
export const forgetKey = () => sessionStorage.removeItem(KEY);
export const storeKey = (key) => sessionStorage.setItem(KEY, key);

/** The address of a path below /admin/api/. */
export const admin = (path) => new URL(path, ADMIN).href;
/** The address of a path of the gateway. */
export const root = (path) => new URL(path.replace(/^\//, ""), ROOT).href;
/** A name as one part of a path, with its slashes. */
export const inPath = (name) => encodeURIComponent(name);

function authorization(key) {
	if (!key) return {};
	// A header takes bytes: those of the key in UTF-8, one character each.
	const octets = new TextEncoder().encode(key);
	return { Authorization: `Bearer ${String.fromCharCode(...octets)}` };
}

async function failure(answer) {
	let error;
	try {
		error = (await answer.json()).error;
	} catch {
		error = undefined; // a proxy in between speaks otherwise
	}
	return new ApiError(answer.status, typeof error === "string" ? { message: error } : error);
}

/**
 * Ask, and return the answer whole.
 * @throws {ApiError} the answer is no success, or there is none.
 */
export async function ask(address, { method = "GET", body, signal, accept, key = storedKey() } = {}) {
	const headers = authorization(key);
	if (accept) headers.Accept = accept;
	if (body !== undefined) headers["Content-Type"] = "application/json";
	let answer;
	try {
		answer = await fetch(address, {
			method,
			headers,
			body: body === undefined ? undefined : JSON.stringify(body),
			signal,
			cache: "no-store",
			credentials: "omit",
			redirect: "error",
		});
	} catch (error) {
		if (signal?.aborted) throw error;
		throw new ApiError(0, { message: "no connection to the gateway", code: "unreachable" });
	}
	if (answer.ok) return answer;
	const error = await failure(answer);
	if (error.status === 401 && key === storedKey()) {
		dispatchEvent(new CustomEvent("inferencia:refused", { detail: error }));
	}
	throw error;
}

/** Ask for JSON below /admin/api/. */
export async function call(method, path, body, signal) {
	const answer = await ask(admin(path), { method, body, signal });
	return answer.status === 204 ? null : answer.json();
}

export const get = (path, signal) => call("GET", path, undefined, signal);

/** The text of an answer, piece by piece as it comes. */
export async function* pieces(answer) {
	const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
	try {
		for (;;) {
			const { done, value } = await reader.read();
			if (done) return;
			yield value;
		}
	} catch (error) {
		throw error.name === "AbortError" ? error : new ApiError(0, { message: "the connection broke" });
	} finally {
		reader.cancel().catch(() => {});
	}
}

/** Server-sent events of an answer: {event, data}. Comments are left out. */
export async function* eventsOf(answer) {
	let rest = "";
	let event = "message";
	let data = [];
	for await (const piece of pieces(answer)) {
		rest += piece;
		// A CR at the end may be the first half of a CR LF.
		const lines = rest.split(/\r\n|\n|\r(?!$)/);
		rest = lines.pop();
		for (const line of lines) {
			if (line === "") {
				if (data.length) yield { event, data: data.join("\n") };
				event = "message";
				data = [];
			} else if (line.startsWith("data:")) {
				data.push(line.slice(5).replace(/^ /, ""));
			} else if (line.startsWith("event:")) {
				event = line.slice(6).trim();
			}
		}
	}
}

/**
 * Follow a stream of events until `signal` says stop; begin again when it breaks.
 * `lost` is told each time that it does, with what was wrong.
 */
export async function follow(path, { signal, told, lost = () => {}, silence = SILENCE, again = () => true }) {
	let wait = 1000;
	while (!signal.aborted) {
		const one = new AbortController();
		const stop = () => one.abort();
		signal.addEventListener("abort", stop, { once: true });
		let watch;
		const alive = () => {
			clearTimeout(watch);
			if (silence) watch = setTimeout(stop, silence);
		};
		try {
			alive();
			const answer = await ask(admin(path), { signal: one.signal, accept: "text/event-stream" });
			for await (const event of eventsOf(answer)) {
				alive();
				wait = 1000;
				told(event);
			}
			lost(null);
		} catch (error) {
			if (signal.aborted) return;
			lost(error);
			if (error.status >= 400 && error.status < 500 && error.status !== 429) return;
		} finally {
			clearTimeout(watch);
			signal.removeEventListener("abort", stop);
			one.abort();
		}
		if (!again()) return;
		await pause(wait * (0.75 + Math.random() / 2), signal);
		wait = Math.min(wait * 2, 15_000);
	}
}

/** A controller that ends with `signal`, if not before. */
export function within(signal) {
	const control = new AbortController();
	signal.addEventListener("abort", () => control.abort(), { once: true });
	return control;
}

/** Wait so many ms, or until `signal` says stop. */
export function pause(ms, signal) {
	return new Promise((done) => {
		const timer = setTimeout(done, ms);
		signal?.addEventListener("abort", () => (clearTimeout(timer), done()), { once: true });
	});
}

/** Send a file; `progress` is told how many of its bytes have gone. */
export function upload(path, file, { progress, signal }) {
	return new Promise((done, failed) => {
		const request = new XMLHttpRequest(); // fetch cannot tell how far it is
		request.open("PUT", admin(path));
		for (const [name, value] of Object.entries(authorization(storedKey()))) {
			request.setRequestHeader(name, value);
		}
		request.setRequestHeader("Content-Type", "application/octet-stream");
		request.upload.addEventListener("progress", (event) => progress(event.loaded));
		request.addEventListener("load", () => {
			let answer = {};
			try {
				answer = JSON.parse(request.responseText);
			} catch {
				// said below by its status alone
			}
			if (request.status < 300) done(answer);
			else failed(new ApiError(request.status, answer.error));
		});
		request.addEventListener("error", () =>
			failed(new ApiError(0, { message: "the connection broke; nothing was kept", code: "unreachable" })));
		request.addEventListener("abort", () =>
			failed(new ApiError(0, { message: "cancelled; nothing was kept", code: "cancelled" })));
		signal?.addEventListener("abort", () => request.abort(), { once: true });
		request.send(file);
	});
}
