"""A run's model, elsewhere: another folder, or the Hub."""

import shutil
from pathlib import Path

from rlhf.ranges import checked


@checked
def main(run: str, *, output: str | None = None, push: str | None = None) -> None:
    """Copies a run's model and its card to a folder, or pushes them to the Hugging Face Hub.

    Of a run that is not over it is the model at the newest checkpoint; one with adapters has none yet.

    Args:
      run: the run's folder.
      output: a new folder.
      push: a name on the Hub, such as me/my-model; needs a login there.
    """
    source = Path(run) / "model"
    if not (source / "config.json").exists():
        raise ValueError(f"{run}: no run with a model yet (of adapters it comes last); --resume it, or give a run's folder")
    if output is not None and push is None:
        if Path(output).exists():
            raise ValueError(f"{output}: exists; give a new folder")
        shutil.copytree(source, output)
        shutil.copy(Path(run) / "README.md", output)
    elif push is not None and output is None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push, exist_ok=True)
        api.upload_folder(repo_id=push, folder_path=source)
        api.upload_file(repo_id=push, path_or_fileobj=Path(run) / "README.md", path_in_repo="README.md")
    else:
        raise ValueError("give --output for a folder, or --push for a name on the Hub, one of them")
    print(output or f"https://huggingface.co/{push}")
