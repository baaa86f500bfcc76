"""Offline scoring: classifies a folder, a list or Parquet files into Parquet files, without a server.

    python -m service.score INPUT OUTPUT

The images go through the decoder, the decode processes and the engine of the server. The work is divided into parts;
each part is one file of the output. A part depends on nothing but its input and the model, so one machine, a cluster
and a resumed run write the same rows. This package needs the extra `score` (pyarrow); only `cluster` needs `ray`.
"""
