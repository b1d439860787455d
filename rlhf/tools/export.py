"""A run's model, elsewhere: another folder, or the Hub."""

import shutil
from pathlib import Path

from rlhf import files
from rlhf.ranges import checked


@checked
def main(
    run: str, *, output: str | None = None, push: str | None = None, overwrite: bool = False
) -> None:
    """Copies a run's model and its card to a folder, or pushes them to the Hugging Face Hub.

    Of a run that is not over it is the model at the newest checkpoint; one with adapters has none
    yet.

    Args:
      run: the run's folder.
      output: a new folder.
      push: a name on the Hub, such as me/my-model; needs a login there.
      overwrite: write over the folder if it holds a model.
    """
    source = Path(run) / "model"
    if not (source / "config.json").exists():
        raise ValueError(
            f"{run}: no run with a model yet (of adapters it comes last); --resume it, or give a "
            "run's folder"
        )
    if (output is None) == (push is None):
        raise ValueError("give --output for a folder, or --push for a name on the Hub, one of them")
    if output is not None:
        files.check_output_folder(output, inputs=[run], overwrite=overwrite)
        # In place at once when it is complete: a copy that is cut off leaves the old model.
        with files.renewed(output) as folder:
            shutil.copytree(source, folder)
            if _card(run).exists():
                shutil.copy(_card(run), folder)
        print(output)
    elif push is not None:
        _push(push, source, _card(run))
        print(f"https://huggingface.co/{push}")


def _card(run: str) -> Path:
    return Path(run) / "README.md"


def _push(name: str, source: Path, card: Path) -> None:
    """Raises: ValueError, whatever the Hub's client raises: no network, no login, no such place."""
    # Here: the command must work without the package where nothing is pushed.
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=source)
        if card.exists():
            api.upload_file(repo_id=name, path_or_fileobj=card, path_in_repo="README.md")
    # Any error: the client raises those of sockets, of HTTP and of its own.
    except Exception as error:
        cure = (
            "see to the network and `hf auth login`, or take --output FOLDER and push that later with "
            "`hf upload`"
        )
        raise ValueError(
            f"{name}: not pushed ({type(error).__name__}: {error!s:.200}); {cure}"
        ) from error
