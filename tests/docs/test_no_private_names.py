"""What must stand in no file of the repository: paths of the machine it was written on, addresses of registries."""

import re

from tests.docs.pages import ROOT, tracked_files

# Put together here, so that this file does not hold what it looks for.
_FOLDERS = ("work", "home", "Users", "root", "mnt")
_PATHS = re.compile(rf"(?<![\w.~:\-])/(?:{'|'.join(_FOLDERS)})/[\w.]")
_REGISTRIES = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("anaconda", "org"),
        ("anaconda", "com"),
        ("index", "crates", "io"),
        ("static", "crates", "io"),
        ("proxy", "golang", "org"),
    )
)


def _texts() -> list[tuple[str, str]]:
    found = []
    for path in tracked_files():
        raw = path.read_bytes()
        if b"\0" not in raw:
            found.append((str(path.relative_to(ROOT)), raw.decode("utf-8")))
    return found


def test_no_file_names_a_path_of_a_machine() -> None:
    named = [f"{name}: {match[0]}" for name, text in _texts() for match in _PATHS.finditer(text)]
    assert not named


def test_no_file_names_a_package_registry() -> None:
    named = [f"{name}: {host}" for name, text in _texts() for host in _REGISTRIES if host in text]
    assert not named


def test_the_search_would_find_them() -> None:
    assert _PATHS.search("see /" + "home/somebody/file")
    assert not _PATHS.search("https://example.org/" + "home/page")
    assert len(_texts()) > 100
