"""Where a user's video or camera is. No torch: a wrong name is reported at once."""

import sys
from pathlib import Path

from fovlm.errors import UserError, did_you_mean_path


def check_path(path: str | Path) -> Path:
    """The path of a video, picture or folder. Raises UserError, with the closest name, when there is none."""
    path = Path(path)
    if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
        raise UserError(f"{path} is an address: download it first and give the file")
    try:
        if not path.exists():
            raise UserError(f"no such file: {path}{did_you_mean_path(path)}")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"{path} is neither a file nor a folder")
    except OSError as error:
        raise unreadable(path, error) from error
    return path


def check_camera(source: str) -> None:
    """Raise UserError when there is no such camera, or no video that is to be played as one."""
    if not source.isdigit():
        check_path(source)
    elif sys.platform == "linux" and not Path(f"/dev/video{source}").exists():
        there = sorted(device.name.removeprefix("video") for device in Path("/dev").glob("video*"))
        raise UserError(f"no camera {source}: there is {', '.join(there) or 'none'}")


def unreadable(path: Path, error: OSError) -> UserError:
    """The error of a path that the system refuses."""
    name = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]}..."  # a question given as the file is long
    return UserError(f"{name} cannot be read: {error.strerror or error}")
