// Numbers, sizes and times for people. 1 KiB is 1,024 bytes, 1 GB is 10^9 bytes. No line ends between a size and its
// unit.

export function count(number) {
  return Math.round(number).toLocaleString("en");
}

export function plural(number, name) {
  return `${count(number)} ${name}${Math.round(number) === 1 ? "" : "s"}`;
}

// Three digits: 1.23, 12.3, 123. Whole numbers have no fraction.
function digits(number) {
  if (number >= 99.95 || Number.isInteger(number)) return count(number);
  return number.toFixed(number >= 9.995 ? 1 : 2);
}

function scaled(number, base, units) {
  let unit = 0;
  while (number >= base * 0.9995 && unit < units.length - 1) {
    number /= base;
    unit += 1;
  }
  return [unit === 0 ? count(number) : digits(number), units[unit]];
}

export function bytes(number) {
  return scaled(number, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]).join("\u00a0");
}

export function fileSize(number) {
  return scaled(number, 1000, ["B", "kB", "MB", "GB"]).join("\u00a0");
}

// The number and the unit of bytes per second.
export function byteRate(number) {
  return scaled(number, 1000, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"]);
}

export function tokenRate(number) {
  return digits(number);
}

export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 1) return "< 1 %";
  return `${Math.round(value)} %`;
}

export function seconds(number) {
  if (number < 0.1) return "< 0.1 s";
  if (number < 10) return `${number.toFixed(1)} s`;
  if (number < 60) return `${Math.round(number)} s`;
  const minutes = Math.floor(Math.round(number) / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(number) % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// "about 40 s left", or nothing if there is no estimate.
export function left(eta) {
  if (eta === null || eta === undefined) return "";
  return eta < 1 ? "almost done" : `about ${seconds(Math.ceil(eta)).replace(".0", "")} left`;
}

export function joined(...parts) {
  return parts.filter(Boolean).join(" · ");
}
