"""Starts a run in an output folder, or checks that the run there can be continued."""

from service.core.model_store import Model
from service.score.description import FORMAT, Description, Input, ModelUsed, Options, Run
from service.score.errors import ScoreError
from service.score.output import OutputFolder
from service.score.rows import Source
from service.score.scorer import ScoreOptions


def start(output: OutputFolder, source: Source, run: Run, *, resume: bool) -> Description:
    """Writes the inventory and the description of a new run, or checks that the started run is the same.

    Args:
        output: The output folder, locked.
        source: The input.
        run: What the user wants now.
        resume: Whether a run that was started is continued.

    Returns:
        The description of the run, as `_score.json` holds it.

    Raises:
        ScoreError: The folder holds something else, a damaged run, or another run; or it cannot be written to.
    """
    if not output.is_started():
        output.check_empty()
        output.remove_partial_files()
        rows_per_part = run.options.rows_per_part
        sha256 = output.write_inventory(lambda file: source.write_inventory(file, rows_per_part))
        description = Description(**dict(run), inventory_sha256=sha256)
        output.write_description(description)
        return description
    if not resume:
        raise ScoreError(
            f"{output.path}: the folder holds the output of a run; continue it with --resume, or choose another folder"
        )
    description = output.description()
    if difference := description.difference(run):
        raise ScoreError(
            f"{output.path}: this run was started with {difference}; continue it with the same, or choose "
            "another folder"
        )
    output.check_inventory(description.inventory_sha256)
    if difference := source.difference(output.inventory):
        raise ScoreError(
            f"{output.path}: the input is not what this run was started with: {difference}; restore it, or score the "
            "present input into another folder"
        )
    output.remove_partial_files()
    return description


def run_of(named: Input, options: ScoreOptions, model: Model) -> Run:
    """What must be the same when a run of this input, with these options and this model, is continued."""
    return Run(
        format=FORMAT,
        input=named,
        model=ModelUsed(
            version=model.version,
            variant=model.variant,
            sha256=model.sha256,
            classes=tuple(model.classes),
            device=model.device,
        ),
        options=Options(
            rows_per_part=options.rows_per_part,
            batch_size=options.batch_size,
            max_image_bytes=options.image_limits.max_bytes,
            max_image_pixels=options.image_limits.max_pixels,
            max_decode_seconds=options.max_decode_seconds,
        ),
    )
