// The address holds what is shown: #models?filter=qwen&sort=-size.
//
// Whoever follows a link or goes back gets the view anew; what is typed into a filter
// replaces the address without either.

/** {view, params} of the address. */
export function here() {
	const [view, query = ""] = location.hash.slice(1).split("?", 2);
	return { view, params: Object.fromEntries(new URLSearchParams(query)) };
}

/** The address of a view. */
export function link(view, params = {}) {
	const kept = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
	const query = new URLSearchParams(kept).toString();
	return query ? `#${view}?${query}` : `#${view}`;
}

/** Change some of the parameters in the address; "" takes one away. */
export function keep(changes) {
	const { view, params } = here();
	history.replaceState(null, "", link(view, { ...params, ...changes }));
}
