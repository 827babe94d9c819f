// What the browser keeps for us. Where it may not, the page remembers until it is closed.

function keeper(area) {
  const remembered = new Map();
  /** Does something with the storage, or else with the memory. */
  const either = (stored, instead) => {
    try {
      return stored(window[area]);
    } catch {
      return instead();
    }
  };
  return {
    /** A text, or null. */
    get: (name) => remembered.get(name) ?? either((storage) => storage.getItem(name), () => null),
    set(name, value) {
      remembered.delete(name);
      either((storage) => storage.setItem(name, value), () => remembered.set(name, value));
    },
    remove(name) {
      remembered.delete(name);
      either((storage) => storage.removeItem(name), () => undefined);
    },
  };
}

/** Until the tab is closed. */
export const forTab = keeper("sessionStorage");
/** For good. */
export const forGood = keeper("localStorage");
