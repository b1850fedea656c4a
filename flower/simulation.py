"""Many sites on one machine: a node of Flower's simulation has a number, that of its site's folder."""

from pathlib import Path

from config import BadInput
from sites.layouts import as_seen, visible


def name_partition(node, config):
    """Give partition i of a simulation the i-th folder of `data`: site, data and out in its node-config.

    Its own files go beside the server's run folder, to OUT_sites/SITE.
    Raises BadInput if there are not as many folders as nodes.
    """
    data, out = Path(config.data), Path(config.out)
    if not (data.is_absolute() and out.is_absolute()):
        raise BadInput("data, out: give both as full paths, for the nodes are started in another folder")
    folders = [folder for folder in visible(data) if folder.is_dir()] if data.is_dir() else []
    if len(folders) != node["num-partitions"]:
        raise BadInput(f"{data}: has {len(folders)} folders of sites and the simulation "
                       f"{node['num-partitions']} nodes, make them equal with num-supernodes")
    folder = folders[node["partition-id"]]
    node |= {"site": as_seen(folder.name), "data": str(folder), "out": str(Path(f"{out}_sites", folder.name))}
