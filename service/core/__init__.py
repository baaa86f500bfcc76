"""From image bytes to probabilities: decoding, queue, batches, engine, models, metrics. Knows no transport."""
