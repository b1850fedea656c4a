"""Many sites on one machine: Flower's simulation runtime gives a node a number, which is that of its site's folder."""

from pathlib import Path

from config import BadInput
from sites.layouts import as_seen, visible


def name_partition(node, config):
    """Give partition i of the simulation runtime the i-th folder of `data`: site, data and out in its node-config.

    Its own files go beside the server's run folder, to OUT_sites/SITE. Raises BadInput if the number of folders is not that of the nodes.
    """
    if not (Path(config.data).is_absolute() and Path(config.out).is_absolute()):
        raise BadInput("data, out: give both as full paths, for the nodes are started in another folder")
    folders = [folder for folder in visible(config.data) if folder.is_dir()] if Path(config.data).is_dir() else []
    if len(folders) != node["num-partitions"]:
        raise BadInput(f"{config.data}: has {len(folders)} folders of sites and the simulation {node['num-partitions']} nodes, "
                       "make them equal with num-supernodes")
    folder = folders[node["partition-id"]]
    node |= {"site": as_seen(folder.name), "data": str(folder), "out": str(Path(f"{config.out}_sites", folder.name))}
