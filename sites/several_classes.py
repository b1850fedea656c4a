"""Of several classes, those that no mask of any site, or of one site, has."""

from config import class_name


def missing_classes(sites, config, hospital):
    """Return texts on the classes that no mask, or no mask of one site, has, and those of nobody, a set."""
    wanted = set(range(1, config.classes))
    drawn = {site: set().union(*((sample.facts or {}).get("labels", wanted) for _, sample in samples))
             for site, samples in sites.items() if samples}
    nobody = wanted - set().union(*drawn.values()) if drawn and not hospital else set()
    texts = [f"{named(j, config)}: no mask of any site has it; it is left out of all scores, mend the masks "
             "or set classes" for j in sorted(nobody)]
    texts += [f"{named(j, config)}: site {site} never draws it, so it trains there as background; if it is "
              "not absent, draw it or leave the site out"
              for site, classes in drawn.items() for j in sorted(wanted - nobody - classes)]
    return texts, nobody


def named(j, config):
    """Return a class for a message: its label, and its name if it has one."""
    return f"class {j}" + f" ({class_name(config, j)})" * bool(config.class_names)
