/** A client of cifar.v1.ImageClassifier with a deadline, retries, TLS and a token. */

import { type ChannelCredentials, Metadata, type ServiceError, credentials } from "@grpc/grpc-js";

import {
  type ClassifyRequest,
  type ClassifyResponse,
  type GetModelResponse,
  ImageClassifierClient,
  type ImageResult,
} from "./generated/cifar/v1/image_classifier.js";

export interface Options {
  /** Use TLS and trust the certificate authorities of the system. */
  tls?: boolean;
  /** PEM of the certificate authority that signed the server's certificate; turns TLS on. */
  ca?: Buffer;
  /** PEM of the client's certificate and of its private key, for mutual TLS; turn TLS on. */
  certificate?: Buffer;
  key?: Buffer;
  /** Bearer token. It is sent over TLS or to this machine only. */
  token?: string;
  /** Seconds for a whole call, including all its requests and retries. */
  timeout?: number;
}

// gRPC itself repeats a request that the server could not accept. It obeys the server's hint when to try again.
const SERVICE_CONFIG = JSON.stringify({
  methodConfig: [
    {
      name: [{ service: "cifar.v1.ImageClassifier" }],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: "0.1s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
      },
    },
  ],
});

// Bytes of a message that are not images: its other fields, and the tags and lengths of each image.
const MESSAGE_OVERHEAD = 1024;
const IMAGE_OVERHEAD = 32;

type Method<Request, Response> = (
  request: Request,
  metadata: Metadata,
  options: { deadline: Date },
  callback: (error: ServiceError | null, response: Response) => void,
) => unknown;

export class Classifier {
  readonly #client: ImageClassifierClient;
  readonly #metadata = new Metadata();
  readonly #timeout: number;
  #model: GetModelResponse | undefined;

  /**
   * @param target Address of the server, HOST:PORT.
   * @throws Error if the token would be sent to another machine without TLS.
   */
  constructor(target = "127.0.0.1:50051", options: Options = {}) {
    const secured = options.tls || options.ca || options.certificate;
    if (options.token) {
      if (!secured && !isThisMachine(target)) {
        throw new Error(`the token would be sent to ${target} without encryption: use TLS`);
      }
      this.#metadata.set("authorization", `Bearer ${options.token}`);
    }
    this.#timeout = options.timeout ?? 60;
    this.#client = new ImageClassifierClient(target, secured ? secure(options) : credentials.createInsecure(), {
      "grpc.service_config": SERVICE_CONFIG,
      "grpc.max_receive_message_length": -1,
    });
  }

  /** Asks the server which model it serves now, and for its limits. Rejects with a ServiceError. */
  async model(deadline = this.#deadline()): Promise<GetModelResponse> {
    const client = this.#client;
    this.#model = await this.#call(client.getModel.bind(client) as Method<object, GetModelResponse>, {}, deadline);
    return this.#model;
  }

  /**
   * Classifies image files (PNG, JPEG, WebP, GIF, BMP).
   *
   * @param images Contents of the files. As many requests are sent as the server's limits need.
   * @param topK Number of classes per image, the most probable first; 0 for all.
   * @returns One result per image, in the same order. An image that the server cannot read has an `error`.
   *     Rejects with a ServiceError if a request fails as a whole.
   */
  async classify(images: readonly Uint8Array[], topK = 0): Promise<ImageResult[]> {
    const deadline = this.#deadline();
    const { limits } = this.#model ?? (await this.model(deadline));
    const results: ImageResult[] = [];
    const client = this.#client;
    for (const group of grouped(images, limits?.maxImages ?? 1, limits?.maxMessageBytes ?? 0)) {
      const request: ClassifyRequest = {
        requestId: "",
        images: group.map((image) => ({ encoded: Buffer.from(image) })),
        packedRgb: Buffer.alloc(0),
        topK,
      };
      const method = client.classify.bind(client) as Method<ClassifyRequest, ClassifyResponse>;
      results.push(...(await this.#call(method, request, deadline)).results);
    }
    return results;
  }

  /** Ends the connection. */
  close(): void {
    this.#client.close();
  }

  #deadline(): Date {
    return new Date(Date.now() + this.#timeout * 1000);
  }

  #call<Request, Response>(method: Method<Request, Response>, request: Request, deadline: Date): Promise<Response> {
    return new Promise((resolve, reject) => {
      method(request, this.#metadata, { deadline }, (error, response) => (error ? reject(error) : resolve(response)));
    });
  }
}

function secure(options: Options): ChannelCredentials {
  return credentials.createSsl(options.ca ?? null, options.key ?? null, options.certificate ?? null);
}

function isThisMachine(target: string): boolean {
  const host = target.slice(0, target.lastIndexOf(":"));
  return host === "localhost" || host === "[::1]" || /^127(\.\d{1,3}){3}$/.test(host);
}

/** The images in groups that fit into one message each, as far as possible. */
function* grouped(images: readonly Uint8Array[], maxImages: number, maxBytes: number): Generator<Uint8Array[]> {
  let group: Uint8Array[] = [];
  let size = MESSAGE_OVERHEAD;
  for (const image of images) {
    const needed = image.length + IMAGE_OVERHEAD;
    if (group.length > 0 && (group.length >= maxImages || size + needed > maxBytes)) {
      yield group;
      group = [];
      size = MESSAGE_OVERHEAD;
    }
    group.push(image);
    size += needed;
  }
  if (group.length > 0) {
    yield group;
  }
}
