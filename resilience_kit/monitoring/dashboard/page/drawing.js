// Small helpers for the page's elements and figures. All text goes in as text: a name cannot become markup.

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Setting what is there already would disturb selections and screen readers.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setClass(element, name, isOn) {
  element.classList.toggle(name, isOn);
}

// One element for each item, kept from second to second: a button stays focused while the figures around it change.
export function keyed(container, items, keyOf, create, update) {
  const old = new Map(Array.from(container.children, (child) => [child.dataset.key, child]));
  let previous = null;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = old.get(key);
    if (child === undefined) {
      child = create(item);
      child.dataset.key = key;
    }
    old.delete(key);
    update(child, item);
    const next = previous === null ? container.firstElementChild : previous.nextElementSibling;
    if (next !== child) container.insertBefore(child, next);
    previous = child;
  }
  for (const child of old.values()) child.remove();
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));
export const compact = (value) =>
  value === null || value === undefined ? "–" : Math.abs(value) < 10_000 ? whole.format(value) : short.format(value);

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 s";
  if (value < 0.001) return "< 1 ms";
  if (value < 0.9995) return `${whole.format(value * 1000)} ms`;
  if (value < 120) return `${value < 9.95 ? value.toFixed(1) : value.toFixed(0)} s`;
  if (value < 7200) return `${(value / 60).toFixed(0)} min`;
  return value < 172_800 ? `${(value / 3600).toFixed(0)} h` : `${(value / 86_400).toFixed(0)} days`;
}

export function dollars(value) {
  if (value === null || value === undefined) return "–";
  const digits = value === 0 || value >= 100 ? 2 : value >= 1 ? 2 : value >= 0.01 ? 3 : 4;
  return `$${value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;
}

export function clock(at) {
  return new Date(at * 1000).toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}
