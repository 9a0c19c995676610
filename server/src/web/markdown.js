// The Markdown that models write, as elements. Text only ever becomes text: no markup of an answer is believed.

const element = (name, ...children) => {
  const made = document.createElement(name);
  made.append(...children);
  return made;
};

/** `code`, **bold** and *emphasis* within a line. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(/`([^`\n]+)`|\*\*(\S(?:[^\n]*?\S)?)\*\*|\*(\w(?:[^*\n]*?\S)?)\*/g)) {
    nodes.push(text.slice(end, found.index));
    const [, code, bold, emphasis] = found;
    if (code !== undefined) nodes.push(element("code", code));
    else if (bold !== undefined) nodes.push(element("strong", ...inline(bold)));
    else nodes.push(element("em", ...inline(emphasis)));
    end = found.index + found[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

/** The blocks of a text: fenced code, headings, lists, paragraphs. */
export function markdown(text) {
  const blocks = [];
  let paragraph = [];
  let list = null;
  let code = null;
  const close = () => {
    if (paragraph.length > 0) blocks.push(element("p", ...inline(paragraph.join("\n"))));
    paragraph = [];
    list = null;
  };
  for (const line of text.split("\n")) {
    const fence = /^\s*(`{3,}|~{3,})/.exec(line)?.[1];
    if (code !== null) {
      if (fence?.startsWith(code.fence)) code = null;
      else code.text.data += `${line}\n`;
      continue;
    }
    if (fence) {
      close();
      code = { fence, text: document.createTextNode("") };
      const block = element("pre", element("code", code.text));
      // It may be wider than the page: then it scrolls, also by keyboard.
      block.tabIndex = 0;
      blocks.push(block);
      continue;
    }
    const heading = /^#{1,6}\s+(.*)$/.exec(line);
    const item = ITEM.exec(line);
    if (heading) {
      close();
      blocks.push(element("h4", ...inline(heading[1])));
    } else if (item) {
      const kind = item[1] === undefined ? "UL" : "OL";
      if (list?.tagName !== kind) {
        close();
        list = element(kind);
        if (kind === "OL") list.start = Number(item[1]);
        blocks.push(list);
      }
      list.append(element("li", ...inline(item[2])));
    } else if (line.trim() === "") {
      close();
    } else {
      if (list) close();
      paragraph.push(line);
    }
  }
  close();
  return blocks;
}
