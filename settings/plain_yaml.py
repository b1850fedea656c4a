"""YAML as its author wrote it: what YAML 1.1 would read as something else is refused."""

import re

import yaml


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader without keys given twice, octal numbers (010), base 60 (1:30) and digits_with_lines."""

    def construct_mapping(self, node, deep=False):
        """Return the mapping; raises yaml.YAMLError for a key that stands in it twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice[:80]!r} is given twice, keep one")
        return super().construct_mapping(node, deep)


def plain_number(loader, node):
    """Return the number of a scalar; raises yaml.YAMLError if it is not written in plain digits."""
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+|[-+]?\.inf|\.nan",
                        node.value, re.IGNORECASE):
        raise yaml.YAMLError(f"{node.value[:80]!r} is not a number in plain digits")
    if node.tag.endswith("int"):
        return loader.construct_yaml_int(node)
    return loader.construct_yaml_float(node)


PlainLoader.add_constructor("tag:yaml.org,2002:int", plain_number)
PlainLoader.add_constructor("tag:yaml.org,2002:float", plain_number)


def read_plain(text):
    """Return what a YAML text holds; raises yaml.YAMLError, ValueError or RecursionError."""
    return yaml.load(text, PlainLoader)
