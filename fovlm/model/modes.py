"""Names and constants of the model that other packages share. No torch."""

from fovlm.errors import UserError, did_you_mean

QUESTIONS = ("after_frames", "before_frames")  # where a question is, as `model.question` says

# The ways to look, of evaluation, `generate` and the gaze; a foveated model was trained on fine tokens.
MODE_NOTES = {
    "coarse_only": "the static query alone",
    "coarse_fine": "coarse pass, queries, fine looks: as trained",
    "autoregressive": "frame by frame, queries from fine tokens: as deployed",
    "multi_token": "pooled tokens of each frame: as trained",
}
# Those of each `visual`; the last one is what deployment does and the default of `generate`.
MODES: dict[str, tuple[str, ...]] = {
    "foveated": ("coarse_only", "coarse_fine", "autoregressive"),
    "coarse": ("coarse_only",),
    "multi_token": ("multi_token",),
}
VISUALS = tuple(MODES)
AS_TRAINED = {"foveated": "coarse_fine", "coarse": "coarse_only", "multi_token": "multi_token"}

NLL_CHUNK = 1024  # text tokens whose logits exist at once: 1024 x 49152 in fp32 is 200 MB
FRAMES_AT_ONCE = 8  # frames that the encoder gets at once when a video is watched frame by frame
NEW_TOKENS = 256  # tokens of an answer, by default


def mode_of(mode: str | None, visual: str) -> str:
    """The way to look of a model with this `visual`; none given is that of deployment. Raises UserError for another."""
    modes = MODES[visual]
    if mode and mode not in modes:
        raise UserError(f"mode is {', '.join(modes)} for this model, not '{mode}'{did_you_mean(mode, modes)}")
    return mode or modes[-1]
