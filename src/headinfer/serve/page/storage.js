// What this browser keeps: "local" until it is removed, "session" until the tab is closed. If the browser refuses to
// keep anything, both last as long as the page.

export const local = keeper("localStorage");
export const session = keeper("sessionStorage");

function keeper(name) {
  try {
    const storage = window[name];
    storage.getItem("");
    return storage;
  } catch {
    const values = new Map();
    return {
      getItem: (key) => values.get(key) ?? null,
      setItem: (key, value) => values.set(key, value),
      removeItem: (key) => values.delete(key),
    };
  }
}
