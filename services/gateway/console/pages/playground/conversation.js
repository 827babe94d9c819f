// The conversation as a tree: an edited message or another answer is a branch beside the first.

import { forTab } from "../kept.js";

const KEPT = "meshserve.conversation";

export class Conversation {
  constructor() {
    this.nodes = new Map([[0, { id: 0, parent: null, children: [], chosen: null }]]);
    this.last = 0;
  }

  /** Adds a message below another, and makes it the one that is shown. */
  add(parent, message) {
    this.last += 1;
    const node = { id: this.last, parent, children: [], chosen: null, ...message };
    this.nodes.set(node.id, node);
    this.nodes.get(parent).children.push(node.id);
    this.nodes.get(parent).chosen = node.id;
    return node;
  }

  /** The messages that are shown, oldest first. */
  path() {
    const path = [];
    let node = this.nodes.get(0);
    while (node.chosen !== null) {
      node = this.nodes.get(node.chosen);
      path.push(node);
    }
    return path;
  }

  /** The messages down to one, which is included. */
  pathTo(id) {
    const path = [];
    for (let node = this.nodes.get(id); node.parent !== null; node = this.nodes.get(node.parent)) path.unshift(node);
    return path;
  }

  /** Where a message stands among its branches, counted from 1, and how many there are. */
  branch(node) {
    const siblings = this.nodes.get(node.parent).children;
    return { position: siblings.indexOf(node.id) + 1, count: siblings.length };
  }

  /** Shows the branch `step` places further. */
  turn(node, step) {
    const parent = this.nodes.get(node.parent);
    const next = parent.children[parent.children.indexOf(node.id) + step];
    if (next !== undefined) parent.chosen = next;
  }

  /** Keeps the conversation for this tab. */
  save() {
    forTab.set(KEPT, JSON.stringify({ last: this.last, nodes: [...this.nodes.values()] }));
  }

  static restored() {
    const conversation = new Conversation();
    try {
      const { last, nodes } = JSON.parse(forTab.get(KEPT));
      conversation.last = last;
      conversation.nodes = new Map(nodes.map((node) => [node.id, node]));
    } catch {
      // None is kept.
    }
    return conversation;
  }
}
