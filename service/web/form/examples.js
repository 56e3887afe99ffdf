/** The bundle's examples: a menu at the prompt, and some of them where no result is yet. */

/** @typedef {{prompt: string, domain?: string}} Example */

const INVITED = 4; // of different domains, as far as there are

/**
 * @param {HTMLSelectElement} menu
 * @param {Example[]} examples
 * @param {(prompt: string) => void} choose
 */
export function fillMenu(menu, examples, choose) {
  const title = menu.options[0];
  /** @type {Map<string, HTMLOptGroupElement>} */
  const groups = new Map();
  examples.forEach(({ prompt, domain = "other" }, index) => {
    const group = groups.get(domain) ?? document.createElement("optgroup");
    group.label = domain;
    groups.set(domain, group);
    group.append(new Option(prompt.trim().slice(0, 60), String(index)));
  });
  menu.replaceChildren(title, ...groups.values());
  /** @type {HTMLElement} */ (menu.closest("label")).hidden = examples.length === 0;
  menu.addEventListener("change", () => {
    if (menu.value !== "") choose(examples[Number(menu.value)].prompt);
    menu.value = "";
  });
}

/**
 * @param {HTMLElement} host
 * @param {Example[]} examples
 * @param {(prompt: string) => void} run
 */
export function fillInvitation(host, examples, run) {
  const domains = [...new Set(examples.map(({ domain }) => domain))];
  const first = domains.map((domain) => examples.find((example) => example.domain === domain));
  const shown = (domains.length > 1 ? first : examples).slice(0, INVITED);
  host.replaceChildren(
    ...shown.map((example) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example?.prompt.trim().slice(0, 80) ?? "";
      button.addEventListener("click", () => run(example?.prompt ?? ""));
      return button;
    }),
  );
}
