"""A wrong policy file is refused whole, with file, line and key, and with what to write instead."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostsock.errors import PolicyError
from vhostsock.offload.policy_file import load_policy, parse_policy
from vhostsock.offload.toml_lines import Lines


def refusal(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy(textwrap.dedent(text), "policy.toml")
    return str(caught.value)


RULE = '[[rule]]\nmatch = { scheme = "tcp" }\naction = "offload"\n'
SECOND_RULE = """\
# a comment with match = 1
[[rule]]
match = {}
action = "native"

[[rule]]
match = { MATCH }
action = "offload"
"""


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("port = 70000", "policy.toml:7: rule 2, key 'port': 70000 is no port"),
        ("port = 0", "in 1..65535"),
        ("port = true", "True is no port"),
        ('port = "80-22"', "'80-22' is no port or range of them"),
        ('port = "http"', 'write 80, "8000-8099" or a list'),
        ("port = []", "an empty list matches nothing; remove the key"),
        ('scheme = "http"', "rule 2, key 'scheme': 'http' is unknown"),
        ('scheme = "tpc"', "did you mean 'tcp'?"),
        ('adress = "10.0.0.1"', "key 'adress': unknown key; did you mean 'address'?"),
        ('address = "10.0.0.1/8"', 'write "10.0.0.0/8" or "10.0.0.1"'),
        ('address = "example.org"', "names are not resolved"),
        ('address = ""', "is no text"),
        ('address = "10.0.0.9-10.0.0.1"', "write the lower address first"),
        ('address = "10.0.0.9-::1"', "both of one version"),
        ('address = "::ffff:10.0.0.1"', "write the IPv4 address"),
        ('address = "::ffff:0:0/97"', "write the IPv4 address"),
        ('address = "fe80::1%eth0"', "without the scope"),
        ('address = "fe80::1", scheme = "udp", port = 1, address2 = "x"', "unknown key; did you mean 'address'?"),
        ("uid = -1", "is no uid"),
        ('direction = "in"', "write a [[publish]] table"),
        ('scheme = "tcp6", address = "10.0.0.1"', "no address of the list belongs to the scheme"),
    ],
)
def test_wrong_condition(match: str, expected: str) -> None:
    text = refusal(SECOND_RULE.replace("MATCH", match))
    assert text.startswith("policy.toml:7: rule 2, key ")
    assert expected in text


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ('errno = "EACCES"', "key 'errno': has no meaning with action 'offload', only with 'deny'"),
        ("connect_timeout = 0", "write seconds"),
        ('rewrite = "tcp://example.org:80"', "names are not resolved"),
        ('rewrite = "udp://10.0.0.1:53"', "the rule matches tcp and the target is udp"),
        ('rewrite = "tcp://10.0.0.1:0"', "port 0 cannot be connected to"),
        ('rewrite = "tcp://{adress}:80"', "unknown placeholder {adress}"),
        ('rewrite = "tcp://{address:80"', "a brace that opens no placeholder"),
        ('rewrite = "tcp://{address}:80"', "gives no URI for a tcp6 request"),
        ('rewrite = "ipx://1.2.3"', "handler 'direct' cannot connect ipx"),
        ('rewrite = "unix://relative"', "three slashes"),
        ('rewrite = "tcp://10.0.0.1:80"\nhandler = "unix"', "the unix handler needs a path"),
        ('rewrite = "unix:///x"\nhandler = "direct"', "handler 'direct' cannot connect unix"),
        ('handler = "unix"', "the unix handler needs a path"),
        ("handler = 7", "is no text"),
        ('acton = "deny"', "did you mean 'action'?"),
    ],
)
def test_wrong_rule(more: str, expected: str) -> None:
    text = refusal(RULE + more)
    assert text.startswith(("policy.toml:4: rule 1, key ", "policy.toml:5: rule 1, key "))
    assert expected in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[rule]]\naction = \"deny\"", "policy.toml:1: rule 1: no 'match'; write match = {"),
        ("[[rule]]\nmatch = {}", "policy.toml:1: rule 1: no 'action'"),
        ("[[rule]]\nmatch = 3\naction = \"deny\"", "policy.toml:2: rule 1, key 'match': 3 is no table"),
        ("[[rule]]\nmatch = {}\naction = \"ofload\"", "key 'action': 'ofload' is unknown; did you mean 'offload'?"),
        ("[[rule]]\nmatch = {}\naction = \"deny\"\nerrno = \"EWRONG\"", ":4: rule 1, key 'errno': 'EWRONG' is no errno"),
        ("[[rule]]\nmatch = {}\naction = \"deny\"\nerrno = 13", "13 is no errno; write its name"),
        ("[[rule]]\nmatch = {}\naction = \"offload\"\nhandler = \"hello\"", "serves streams, and the rule matches udp too"),
        ("[[rule]]\nmatch = {}\naction = \"offload\"\nrewrite = \"unix:///x\"", "serves streams, and the rule matches udp too"),
        ("[[rule]]\n[rule.match]\nport = 0", "policy.toml:3: rule 1, key 'port': 0 is no port"),
        ("[rule]\nmatch = {}", "policy.toml:1: key 'rule': write each as a table of its own, under the line [[rule]]"),
        ("[[rule]]\nmatch = { scheme = \"ipx\" }\naction = \"offload\"\nrewrite = \"udp://1.2.3.4:1\"", "its address says"),
        ("[ipx]\nnetwork = \"000000a1\"", "key 'ipx': write each as a table of its own, under the line [[ipx]]"),
        ("[[ipx]]\nlisten = \"udp://10.0.0.1\"", "policy.toml:1: ipx 1: no 'network'"),
        ("[[ipx]]\nnetwork = \"000000a1\"", "ipx 1: no 'listen'"),
        ("[[ipx]]\nnetwork = \"a1\"", "policy.toml:2: ipx 1, key 'network': 'a1' is no network number; write its 8 hex"),
        ("[[ipx]]\nnetwork = \"00000000\"", "is no network number"),
        ("[[ipx]]\nlisten = \"udp://0.0.0.0\"", "is no place of a node"),
        ("[[ipx]]\nlisten = \"udp6://::1/213\"", "is no place of a node"),
        ("[[ipx]]\nlisten = \"udp://10.0.0.1:0\"", "is no place of a node"),
        ("[[ipx]]\npeers = [\"udp://host\"]", "names are not resolved"),
        ("default = \"offload\"", "policy.toml:1: key 'default': offloading everything must be said by a rule"),
        ("default = \"nativ\"", "did you mean 'native'?"),
        ("errno = \"EACCES\"", "has no meaning without default = \"deny\""),
        ("\nrules = []", "policy.toml:2: key 'rules': unknown key; did you mean 'rule'?"),
        ("a = 1\nb = = 2", "policy.toml:2: not TOML: Invalid value"),
        ("[[rule]", "policy.toml:1: not TOML"),
    ],
)  # fmt: skip
def test_wrong_file(text: str, expected: str) -> None:
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "policy.toml:1: publish 1: no 'guest'"),
        ('guest = "ipx://1.2.3"', "policy.toml:2: publish 1, key 'guest': 'ipx://1.2.3' cannot stand here"),
        ('guest = "udp://0.0.0.0:53"\nhost = "tcp://127.0.0.1:53"', "the guest binds udp, so must the host"),
        ('guest = "udp://0.0.0.0:53"\nhost = "unix:///run/x"', 'datagrams go to an address; write "udp://127.0.0.1:{port}"'),
        ('guest = "udp://0.0.0.0:5"\nhost = "udp://0.0.0.0:5"\ngroups = "10.0.0.1"', "'10.0.0.1' is not multicast"),
        ('guest = "udp://0.0.0.0:5"\ngroups = "239.1.2.3"', 'write host = "udp://0.0.0.0:{port}"'),
        ('guest = "udp://0.0.0.0:5"\nhost = "udp://0.0.0.0:5"\ngroups = "ff15::/16"', 'write host = "udp6://::/{port}"'),
        ('guest = "tcp://0.0.0.0:5"\nhost = "tcp://0.0.0.0:5"\ngroups = "239.1.2.3"', "is heard by a datagram socket"),
        ('guest = "udp://0.0.0.0:5"\ninterface = "eth0"', "is where groups are joined"),
        ('guest = "tcp://0.0.0.0:{port}"', 'write "*" for every port'),
        ('guest = "tcp://0.0.0.0:0-10"', "0 asks for any port and is in no range"),
        ('guest = "tcp://0.0.0:80"', "no IPv4 address"),
        ('guest = "tcp://0.0.0.0:80"\nhost = "80"', "cannot stand here"),
        ('guest = "tcp://0.0.0.0:80-89"\nhost = "tcp://127.0.0.1:80"', "10 guest ports (80-89) onto 1 of the host (80)"),
        ('guest = "tcp://0.0.0.0:80"\nhost = "tcp://127.0.0.1:80-89"', "1 guest ports (80) onto 10 of the host"),
        ('guest = "tcp://0.0.0.0:*"\nhost = "tcp://127.0.0.1:80"', "write a range of the same length, {port}"),
        ('guest = "tcp://0.0.0.0:*"\nhost = "tcp://127.0.0.1:*"', "write {port} for the same port as in the guest"),
        ('guest = "tcp://0.0.0.0:80-89"\nhost = "unix:///run/x"', "one path for many guest ports"),
        ('guest = "tcp://0.0.0.0:80"\nhost = "unix:///run/{prt}"', "unknown placeholder {prt}"),
        ('guest = "tcp://0.0.0.0:80"\nhost = "unix://run"', "three slashes"),
        ('guest = "tcp://0.0.0.0:80"\nmatch = {}', "match': unknown key; the keys are guest, host, device, netns, groups, int"),
    ],
)
def test_wrong_publish(text: str, expected: str) -> None:
    assert expected in refusal("[[publish]]\n" + text)


def test_missing_file_is_a_policy_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"nowhere\.toml: cannot read the policy: No such file"):
        load_policy(tmp_path / "nowhere.toml")


def test_file_that_is_not_utf8_is_a_policy_error_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"# one\n# \xff\n")
    with pytest.raises(PolicyError, match=r"p.toml:2: not UTF-8"):
        load_policy(tmp_path / "p.toml")


def test_good_file_is_loaded_with_its_positions(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("# hello\n\n" + RULE)
    policy = load_policy(path)
    assert [str(rule) for rule in policy.rules] == [f"rule 1 at {path}:3"]


@given(st.text(alphabet='[]{}="#.,-: \nabrule0123456789matchpublishdefaultscheme', max_size=200))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    with contextlib.suppress(PolicyError):
        parse_policy(text)


def test_lines_skip_strings_and_comments() -> None:
    text = '# a = 1\nb = "c = 2"  # d = 3\n[[t]]\ne = { f = 1,\n  g = "}" }\n[t.h]\ni = 1\n[[t]]\ne = 2\n'
    lines = Lines(text)
    assert [lines.of("", 0, key) for key in "abcd"] == [1, 2, 1, 1]
    assert [lines.of("t", 1, key) for key in "efghi"] == [4, 4, 5, 6, 7]
    assert [lines.of("t", 2), lines.of("t", 2, "e"), lines.of("t", 2, "f")] == [8, 9, 8]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[hairpin]\n", "policy.toml:1: hairpin: no 'netns'; write netns"),
        ('[hairpin]\nnetns = "two words"', "policy.toml:2: hairpin, key 'netns': 'two words' is no name of a namespace"),
        ('[hairpin]\nnetns = "j"\nport = 1', "policy.toml:3: hairpin, key 'port': unknown key"),
        ('hairpin = "judge"', "there is one: write it as a table, under the line [hairpin]"),
        ('[[hairpin]]\nnetns = "j"', "there is one: write it as a table, under the line [hairpin]"),
    ],
)
def test_wrong_hairpin(text: str, expected: str) -> None:
    assert expected in refusal(text)
