"""What keeps an int8 graph from overflowing on any processor. Must not import torch or onnx.

Processors without VNNI add the products of two activations (unsigned, 8 bits) and two weights in 16 bits. With weights
of 8 bits the sum can overflow, and nothing reports it: the model shipped until 2026-11-29 lost 2.7 points of its
accuracy. With weights of 7 bits, which are -64 to 64, it cannot: 2 * 255 * 64 is less than 2**15.
"""

WEIGHT_BITS = 7
"""Bits of a weight in the graphs that `cifar_core.quantise` writes."""

EARLIER_WEIGHT_BITS = 8
"""Bits of a weight in exports whose manifest does not say it."""

EXACT_INT8 = "session.x64quantprecision"
"""Key of an option of onnxruntime's sessions. With the value "1", processors without VNNI use slower instructions that
do not overflow; graphs with more than `WEIGHT_BITS` need it.
"""
