"""What `pip install .` runs: it says what to do instead."""


def get_requires_for_build_wheel(config_settings=None):
    """End with a sentence on how this project is used."""
    raise SystemExit("FedBCS is a repository to clone, not a package: run pip install -r requirements.txt, "
                     "then its programs in this folder, as README.md says.")


build_editable = get_requires_for_build_editable = get_requires_for_build_wheel
