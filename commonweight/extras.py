"""What a command says that needs a package of an extra, `[data]`, `[demo]` or `[encoders]` in pyproject.toml."""

from protocol.errors import PackageMissing


def not_installed(need: str, extra: str) -> PackageMissing:
    """Return the error for a package that is not there.

    Args:
        need: what needs which package, as the beginning of a sentence.
        extra: the extra that brings it. From the project's folder, since nobody has promised the name on an index.
    """
    return PackageMissing(
        f"{need}, which is not installed; in the project's folder, `pip install -c constraints.txt '.[{extra}]'` "
        "installs it."
    )
