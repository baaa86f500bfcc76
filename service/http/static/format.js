/** Numbers and times as text. */

const COUNT = new Intl.NumberFormat("en");

export const count = (number) => COUNT.format(number);

/** "1 picture", "1,024 pictures" */
export const counted = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

export function bytes(number) {
  if (number < 1000) return counted(number, "byte");
  const inMegabytes = number >= 999_500;
  const value = number / (inMegabytes ? 1e6 : 1e3);
  return `${value.toFixed(value < 10 && number % (inMegabytes ? 1e6 : 1e3) ? 1 : 0)} ${inMegabytes ? "MB" : "kB"}`;
}

export function duration(seconds) {
  if (seconds < 0.0995) return `${(1000 * seconds).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 0.9995) return `${(1000 * seconds).toFixed(0)} ms`;
  return `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
}
