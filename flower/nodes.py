"""Which node is which site: who may join, by which name, and one question to all of them."""

import re
import sys
import time
import unicodedata
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from flower.fit import Misfit, SiteFailed, site_name
from sites.files import reading

# Cyrillic and Greek letters, and the Latin ones that they look like
LOOK_ALIKES = str.maketrans("авеһіјкмнорԛѕтухԁӏѵԝαεικμνορτυχ", "abehijkmhopqstyxdlvwaeikuvoptux")


class Stranger(Misfit):
    """A node that is none of this run's sites."""


def likeness(name):
    """Return what a name looks like, the same for names that a reader could take for each other."""
    return unicodedata.normalize("NFKC", name).casefold().translate(LOOK_ALIKES)


class Nodes:
    """The nodes of a run, and the sites that they have answered as."""

    def __init__(self, grid, guards, run, hold_out=None):
        """grid: Flower's; run: its settings, of which `sites` and `timeout` are read here."""
        self.grid, self.guards, self.timeout, self.hold_out = grid, guards, run["timeout"], hold_out
        sites = run["sites"]                # a number, names with commas between them, or FILE.txt of names
        if isinstance(sites, str) and sites.endswith(".txt"):
            with reading(sites, "a list of names"):
                sites = Path(sites).read_text(encoding="utf-8")
        names = re.split("[,\n]", sites) if isinstance(sites, str) else None
        self.listed = names and {*map(str.strip, names)} - {""}
        self.number = sites if self.listed is None else len(self.listed)
        self.names, self.there = {}, []     # {node: site} of all so far; nodes of now
        self.strangers = set()              # nodes that are not asked again
        self.last, self.before = {}, set()  # {site: kept}, which the run changes; its sites at the start

    def ask(self, kind, records, chosen=None):
        """Send records {name: record} to every node; return {site: its records, or what is wrong}. Waits for
        all sites to be there (with `skip`, once the run goes on, for min_sites), then for their answers,
        `timeout` seconds each. chosen: the names of those that are told to train, None for all. Raises
        SiteFailed if a site is missing and may not be."""
        stop = self.guards.on_site_failure == "stop"
        wanted = self.number if stop or not self.names else self.guards.min_sites
        found = self.gather(wanted)
        found |= self.exchange([node for node in self.there if node not in found], kind, records, chosen)
        answers = {site: RuntimeError("its node is gone") for site in self.names.values()}
        # what is good comes last
        for node in sorted(self.there, key=lambda node: not isinstance(found[node], Exception)):
            answers[self.names.get(node, f"of node {node}")] = found[node]
        if len(self.there) < (wanted if stop else self.guards.min_sites):
            raise SiteFailed(f"{len(self.there)} of {wanted} sites are there after {self.timeout} s: "
                             f"{', '.join(answers)}")
        return answers

    def gather(self, wanted):
        """Wait for `wanted` nodes; return {node: what is wrong} of those that do not say who they are. They
        are asked that before anything else once the run has weights of somebody, or if its sites are listed;
        each is sent what concerns its own site alone."""
        end, wrong = time.monotonic() + self.timeout, {}
        while True:
            self.there = [node for node in self.grid.get_node_ids() if node not in self.strangers]
            if self.last or self.listed is not None:
                new = [node for node in self.there if node not in {**self.names, **wrong}]
                answers = self.exchange(new, "query", {})
                wrong |= {node: answer for node, answer in answers.items() if isinstance(answer, Exception)}
            if len(self.there) >= wanted or time.monotonic() >= end:
                return wrong
            time.sleep(1)

    def exchange(self, nodes, kind, records, chosen=None):
        """Return {node: the records of its answer, or what is wrong with it}, in the order of the answers."""
        messages = []
        for node in nodes:
            site = self.names.get(node)  # which is told of itself whether it trains, and what was taken last
            turn = {"train": self.trains(site, chosen), "last": self.last.get(site, {}).get("round", 0)}
            content = RecordDict(records | {"turn": ConfigRecord(turn)})
            # a node that comes back later than ttl is spared what nobody waits for
            messages.append(Message(content, node, kind, ttl=self.timeout + 60))
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout)) if messages else []
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        replies = {asked[number]: reply for reply in replies
                   if (number := reply.metadata.reply_to_message_id) in asked}
        return {node: self.content_of(node, replies) for node in dict.fromkeys([*replies, *nodes])}

    def trains(self, site, chosen):
        """Return whether a site, None if its name is not known yet, trains in a round."""
        return (chosen is None or site in chosen) and (site is None or site != self.hold_out)

    def content_of(self, node, replies):
        """Return the records of a node's reply, or what is wrong with it; note its site's name. replies:
        {node: reply}. A stranger is named once and is not asked again."""
        reply = replies.get(node)
        if reply is None:
            return TimeoutError(f"no answer within {self.timeout} s")
        if reply.has_error():
            return RuntimeError(reply.error.reason)
        try:
            name = site_name(reply.content)
            self.check_name(node, name, replies)
        except Misfit as problem:
            if isinstance(problem, Stranger):
                self.strangers.add(node)
                self.there.remove(node)
                print(f"node {node} is refused: {problem}", file=sys.stderr, flush=True)
            return problem
        self.names[node] = name
        problem = reply.content["site"].get("problem")
        return reply.content if problem is None else RuntimeError(problem)

    def check_name(self, node, name, replies):
        """Raise Misfit unless a node may have this name, one of the run's. A name belongs to the key that was
        registered by it (`flwr supernode register --name`), else to the node that had it first, until that
        node no longer answers."""
        own = {info.node_id: info.name for info in getattr(self.grid, "get_nodes", list)()}.get(node)
        if own and own != name:
            raise Misfit(f"its key is registered as {own} and it answers as {name}")
        if self.names.get(node, name) != name:
            raise Misfit(f"its node has answered as {self.names[node]} before and now as {name}")
        if self.listed is not None and name not in self.listed:
            raise Stranger(f"it answers as {name}, which is none of the names in sites")
        others = self.before | {site for other, site in self.names.items() if other in self.there}
        if twins := [site for site in others if site != name and likeness(site) == likeness(name)]:
            raise Misfit(f"its name {name} looks like that of {twins[0]}")
        known = {*self.before, *self.names.values()}
        if self.listed is None and name not in known and len(others) >= self.number:
            raise Stranger(f"it answers as {name}, and all {self.number} sites are there")
        holder = next((other for other, site in self.names.items() if site == name and (
            other == node or other in replies and not replies[other].has_error())), node)
        if holder != node:
            self.names.pop(node, None)  # in what is said it has a number again, for the name is the other's
            raise Misfit(f"two nodes answer as one site, give each its own name: {name}")
