"""What counts as rounding, by the precision a file or engine runs in.

TF32 has the mantissa of fp16. For fp16 and bf16 the limits are 16, 32 and 128 times their rounding (2^-11, 2^-8); the most seen on
DINOv2 with real photos is 9, 18 and 75 times. For int8 they are three times the most seen: its scales, not its arithmetic, decide.
"""

# Outputs, on equal decisions: largest difference over the largest value.
TOLERANCE = {"fp32": 2e-4, "tf32": 8e-3, "fp16": 8e-3, "bf16": 6e-2, "int8": 4e-1}
# A flipped near-tie: what it may give away, of a cosine of metrics, or of a score's logarithm, its relative difference.
NEAR_TIE = {
    "fp32": {"metric": 1e-4, "score": 1e-4},
    "tf32": {"metric": 1.6e-2, "score": 6e-2},
    "fp16": {"metric": 1.6e-2, "score": 6e-2},
    "bf16": {"metric": 1.2e-1, "score": 5e-1},
    "int8": {"metric": 1.2e-1, "score": 2.5e0},
}
# One stage, computed by the reference from the file's own input of it: difference over what the stage adds to the tokens; of merging,
# and of the embedding, over the tokens themselves, the worst row. Ten times the most seen in fp32 and fp16, four times in bf16, twice in
# int8. What two roundings of the tokens explain is taken off before.
STAGE = {"fp32": 1e-4, "tf32": 3e-2, "fp16": 3e-2, "bf16": 4e-1, "int8": 3e-1}
# Of the tokens a file keeps between stages, relative: half a unit in the last place of their type.
ROUNDING = {"fp32": 2.0**-24, "tf32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 2.0**-11}


def near_tie(precision: str, method: str) -> float:
    """The limit of NEAR_TIE for a method: the largest of the signals it decides by.

    Args:
        precision: a row of NEAR_TIE.
        method: a name of the reducer table; one without signals decides nothing that could be a near-tie.
    """
    from ...export import reducers
    from ...export.plan import SIGNALS

    return max((NEAR_TIE[precision][SIGNALS[name].kind] for name in reducers.get(method).signals), default=0.0)
