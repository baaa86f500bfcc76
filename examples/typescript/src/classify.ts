#!/usr/bin/env node
/** Classifies image files and prints one line of JSON for each. */

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import { Classifier } from "./classifier.js";

const HELP = `usage: classify [options] IMAGE…

Classifies image files through a server and prints one line of JSON for each.

  --server HOST:PORT   address of the server; default: 127.0.0.1:50051
  --top-k N            number of classes per image, 0 for all; default: 3
  --timeout SECONDS    give up after this time; default: 60
  --tls                use TLS and trust the certificate authorities of the system
  --ca FILE            use TLS and trust the certificate authority in this PEM file
  --certificate FILE   PEM file of the client's certificate, for mutual TLS
  --key FILE           PEM file of the private key of --certificate
  --token-file FILE    file whose first line is sent as bearer token

exit code: 0 if all images were classified, 1 if some could not be read, 2 otherwise`;

// Images that are read and sent together, so that a long list is never in memory as a whole.
const TOGETHER = 64;

interface Loaded {
  image: string;
  content?: Buffer;
  error?: string;
}

async function load(image: string): Promise<Loaded> {
  try {
    return { image, content: await readFile(image) };
  } catch (error) {
    return { image, error: message(error) };
  }
}

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function number(name: string, value: string): number {
  const parsed = Number(value);
  if (!Number.isFinite(parsed) || parsed < 0) {
    throw new Error(`--${name} ${value}: it must be a number that is not negative`);
  }
  return parsed;
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      help: { type: "boolean", short: "h" },
      server: { type: "string", default: "127.0.0.1:50051" },
      "top-k": { type: "string", default: "3" },
      timeout: { type: "string", default: "60" },
      tls: { type: "boolean" },
      ca: { type: "string" },
      certificate: { type: "string" },
      key: { type: "string" },
      "token-file": { type: "string" },
    },
  });
  if (values.help || positionals.length === 0) {
    console.log(HELP);
    return values.help ? 0 : 2;
  }
  const file = async (path: string | undefined) => (path === undefined ? undefined : await readFile(path));
  const classifier = new Classifier(values.server, {
    tls: values.tls,
    ca: await file(values.ca),
    certificate: await file(values.certificate),
    key: await file(values.key),
    token: (await file(values["token-file"]))?.toString().split("\n")[0]?.trim(),
    timeout: number("timeout", values.timeout),
  });
  let failed = false;
  try {
    for (let start = 0; start < positionals.length; start += TOGETHER) {
      const loaded = await Promise.all(positionals.slice(start, start + TOGETHER).map(load));
      const contents = loaded.flatMap(({ content }) => content ?? []);
      const results = (await classifier.classify(contents, number("top-k", values["top-k"]))).values();
      for (const { image, content, error } of loaded) {
        const result = content && results.next().value;
        const reason = error ?? result?.error?.message ?? null;
        failed ||= reason !== null;
        console.log(JSON.stringify({ image, classes: result?.classes ?? [], error: reason }));
      }
    }
  } finally {
    classifier.close();
  }
  return failed ? 1 : 0;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`error: ${message(error)}`);
  process.exitCode = 2;
}
