"""The git side of a series, on small repositories: ranges, mailboxes, and everything that is wrong with them."""

import base64
import gzip
import mailbox
import os
import quopri
import subprocess

import pytest

from harness.lab.errors import LabInputError
from harness.lab.kbuild import workspace
from harness.series.git import Commit, Repository
from harness.series.mbox import ApplyError, apply_mbox, read_mailbox

IDENTITY = {
    "GIT_AUTHOR_NAME": "A Uthor", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "C",
    "GIT_COMMITTER_EMAIL": "c@example.org", "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
}  # fmt: skip
MAKEFILE = "VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\nEXTRAVERSION =\n"
CODE = "".join(f"line {n}\n" for n in range(30))
EMULATE = "arch/x86/kvm/emulate.c"


class Tree:
    """A scratch kernel tree under git."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        self.git("init", "--quiet", "--initial-branch=main", ".")

    def git(self, *words):
        done = subprocess.run(
            ["git", "-C", self.path, *words], env=os.environ | IDENTITY, capture_output=True, text=True, check=True
        )
        return done.stdout

    def commit(self, message, **files):
        """Commit files (``__`` in a name is ``/``); the commit's id."""
        for name, text in files.items():
            self.write(name.replace("__", "/").replace("_c", ".c"), text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD").strip()

    def write(self, name, text):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    made = Tree(tmp_path / "linux")
    for name, text in {
        "Makefile": MAKEFILE, "Kbuild": "", "Kconfig": "", "arch/x86/kvm/Kconfig": "", EMULATE: CODE,
    }.items():  # fmt: skip
        made.write(name, text)
    made.commit("Linux 7.3.4")
    return made


@pytest.fixture
def series(tree):
    """Three patches on ``base``."""
    tree.git("tag", "base")
    tree.commit("KVM: x86: one\n\nNo functional change intended.", arch__x86__kvm__emulate_c=CODE + "one\n")
    tree.commit("KVM: x86: two", arch__x86__kvm__emulate_c=CODE + "one\ntwo\n")
    tree.commit("KVM: x86: three", arch__x86__kvm__new_c="three\n")
    return tree


def refused(tree, text):
    with pytest.raises(LabInputError) as caught:
        Repository(tree.path).range(text)
    assert caught.value.status == 2
    return str(caught.value)


def test_a_range_is_its_commits_in_order(series):
    found = Repository(series.path).range("base..HEAD")
    assert [c.subject for c in found.commits] == ["KVM: x86: one", "KVM: x86: two", "KVM: x86: three"]
    assert found.base.subject == "Linux 7.3.4"
    assert found.commits[0].parents == (found.base.id,)
    assert found.commits[0].author == "A Uthor"


def test_an_open_range_ends_at_head(series):
    assert len(Repository(series.path).range("base..").commits) == 3


@pytest.mark.parametrize(
    ("message", "claims"),
    [
        ("x\n\nNo functional change intended.", True), ("x\n\nNo functional\nchanges.", True), ("x (NFC)", True),
        ("x\n\nno intended functional change", True), ("NFCI: x", True), ("x\n\nnon-functional change", False),
        ("fix the NFCT hook", False), ("a functional change", False),
    ],
)  # fmt: skip
def test_no_functional_change_is_recognized(message, claims):
    assert Commit("1" * 40, "2" * 40, (), "A", message).claims_no_change is claims


def test_an_empty_range(tree):
    with pytest.raises(LabInputError, match=r"the range is empty: give BASE\.\.TIP"):
        Repository(tree.path).range(" ")


def test_no_git_tree(tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(LabInputError, match="is no git tree: commits are asked for"):
        Repository(tmp_path / "plain")
    with pytest.raises(LabInputError, match="no such directory"):
        Repository(tmp_path / "nowhere")


def test_unknown_range(series):
    assert "no commit 'nope'" in refused(series, "nope..HEAD")
    assert "no commit 'nope'" in refused(series, "base..nope")
    assert "no commit 'nope'" in refused(series, "nope")
    assert "as in base..HEAD" in refused(series, "base...HEAD")
    assert "names no BASE" in refused(series, "..HEAD")
    assert "no commits" in refused(series, "base..base")
    assert "HEAD..base is empty, for base is older: give base..HEAD" in refused(series, "HEAD..base")


def test_one_commit_is_no_range_and_no_empty_one_is_suggested(series):
    assert refused(series, "HEAD").endswith("two dots between two commits, as in HEAD~1..HEAD for that commit alone")
    assert "HEAD~1~1..HEAD~1 for that commit alone, or HEAD~1..HEAD for all after it" in refused(series, "HEAD~1")
    assert refused(series, "base").endswith("as in base..HEAD for all after it")
    for text in ("HEAD~1..HEAD", "HEAD~1~1..HEAD~1", "base..HEAD"):
        assert Repository(series.path).range(text).commits


def test_an_option_is_no_revision(series):
    assert "no commit '--all'" in refused(series, "--all..HEAD")


def test_base_that_is_no_ancestor(series):
    series.git("checkout", "--quiet", "-b", "other", "base")
    series.commit("elsewhere")
    fork = series.git("rev-parse", "base")[:12]
    assert f"they part at {fork}" in refused(series, "other..main")
    assert f"give {fork}..main" in refused(series, "other..main")


def test_merge_commits_are_named(series):
    series.git("checkout", "--quiet", "-b", "side", "base")
    series.commit("aside", Kbuild="# x\n")
    series.git("checkout", "--quiet", "main")
    series.git("merge", "--quiet", "--no-ff", "-m", "Merge the side", "side")
    assert 'has 1 merge commit: a series is one patch after the other' in refused(series, "base..HEAD")
    assert '("Merge the side")' in refused(series, "base..HEAD")


def test_dirty_tree(series):
    repository = Repository(series.path)
    repository.check_clean()
    series.write("untracked", "")
    repository.check_clean()
    series.write(EMULATE, "changed\n")
    with pytest.raises(LabInputError, match=rf"uncommitted changes.*{EMULATE}.*--allow-dirty"):
        repository.check_clean()


def test_older_than_the_lab_knows(series):
    series.git("tag", "new")
    series.git("checkout", "--quiet", "base")
    series.commit("Linux 5.15", Makefile=MAKEFILE.replace("7", "5", 1).replace("3", "15", 1))
    series.git("tag", "old")
    series.commit("patch")
    text = refused(series, "old..HEAD")
    assert "is Linux 5.15.4: kernels before 6.1 are unsupported" in text
    assert "lab run --kernel" in text


def test_no_linux_at_all(tree):
    tree.git("rm", "--quiet", "Makefile")
    tree.commit("gone")
    tree.commit("patch")
    assert "is no Linux source tree" in refused(tree, "HEAD~1..HEAD")


@pytest.mark.parametrize("depth", [2, 4])
def test_shallow_clone(series, tmp_path, depth):
    base = series.git("rev-parse", "base").strip()
    subprocess.run(
        ["git", "clone", "--quiet", f"--depth={depth}", f"file://{series.path}", tmp_path / "shallow"], check=True
    )
    repository = Repository(tmp_path / "shallow")
    if depth == 2:  # the base lies beyond
        with pytest.raises(LabInputError, match=r"shallow clone without it: .* fetch --unshallow"):
            repository.range(f"{base}..HEAD")
    else:
        assert len(repository.range("HEAD~3..HEAD").commits) == 3


# --- mailboxes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mbox(series, tmp_path):
    path = tmp_path / "series.mbox"
    path.write_text(series.git("format-patch", "--stdout", "--cover-letter", "base..HEAD"))
    series.git("reset", "--quiet", "--hard", "base")
    return path


def applied(tree, mbox):
    """The subjects of the patches, as commits that only the private copy knows."""
    with workspace(tree.path) as work:
        base = Repository(tree.path).commit("base")
        tip = apply_mbox(work.copy, mbox, base, print)
        found = Repository(tree.path, work.copy.environment()).range(f"{base.id}..{tip.id}")
        assert [work.copy.snapshot(c.id) for c in found.commits] == [c.tree for c in found.commits]
        assert not (work.copy.folder / "mail").exists()
    return found


def state(tree):
    return tree.git("status", "--porcelain"), tree.git("for-each-ref"), tree.git("count-objects", "-v"), sorted(
        str(p) for p in tree.path.rglob("*")
    )


def test_a_mailbox_becomes_commits_and_the_checkout_is_not_touched(series, mbox):
    before = state(series)
    found = applied(series, mbox)
    assert [c.subject for c in found.commits] == ["KVM: x86: one", "KVM: x86: two", "KVM: x86: three"]
    assert found.commits[0].claims_no_change
    assert state(series) == before


def test_the_same_mails_become_the_same_commits(series, mbox):
    assert applied(series, mbox) == applied(series, mbox)


def test_a_mailbox_on_a_shallow_clone(series, mbox, tmp_path):
    series.commit("later")
    series.git("tag", "--force", "base")
    subprocess.run(
        ["git", "clone", "--quiet", "--depth=1", f"file://{series.path}", tmp_path / "shallow"], check=True
    )
    clone = Tree.__new__(Tree)
    clone.path = tmp_path / "shallow"
    assert Repository(clone.path).shallow
    assert len(applied(clone, mbox).commits) == 3


def test_a_patch_that_does_not_apply_is_named_with_its_reject(series, mbox):
    series.commit("in the way", arch__x86__kvm__emulate_c=CODE.replace("line 29", "another") + "else\n")
    series.git("tag", "--force", "base")
    with pytest.raises(ApplyError) as caught:
        applied(series, mbox)
    text = str(caught.value)
    assert "mail 2 of 4 does not apply: KVM: x86: one" in text  # the cover letter is mail 1
    assert f"{EMULATE}" in text
    assert "+one" in text
    assert "base-commit" in text


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "8bit"])
def test_mails_as_mail_programs_encode_them(series, mbox, encoding):
    plain = read_mailbox(mbox)
    mails = []
    for mail in mailbox.mbox(mbox):
        text = mail.get_payload(decode=True)
        for name in ("Content-Type", "Content-Transfer-Encoding", "MIME-Version"):
            del mail[name]
        mail["MIME-Version"] = "1.0"
        mail["Content-Type"] = 'text/plain; charset="utf-8"'
        mail["Content-Transfer-Encoding"] = encoding
        encode = {"base64": base64.encodebytes, "quoted-printable": quopri.encodestring, "8bit": bytes}[encoding]
        mail.set_payload(encode(text).decode("latin-1"))
        mails.append(mail.as_bytes(unixfrom=True))
    mbox.write_bytes(b"\n".join(mails))
    assert (b"+++ b/" in mbox.read_bytes()) is (encoding != "base64")
    assert read_mailbox(mbox) == plain
    assert [c.subject for c in applied(series, mbox).commits] == ["KVM: x86: one", "KVM: x86: two", "KVM: x86: three"]


def test_modes_and_old_names_are_files_of_a_series(series, tmp_path):
    series.git("reset", "--quiet", "--hard", "base")
    (series.path / EMULATE).chmod(0o755)
    series.git("commit", "--quiet", "--all", "-m", "a mode")
    series.git("mv", EMULATE, f"{EMULATE}.old")
    series.git("commit", "--quiet", "--all", "-m", "a new name")
    path = tmp_path / "modes.mbox"
    path.write_text(series.git("format-patch", "--stdout", "base..HEAD"))
    series.git("reset", "--quiet", "--hard", "base")
    assert read_mailbox(path).files == {EMULATE, f"{EMULATE}.old"}
    assert [c.subject for c in applied(series, path).commits] == ["a mode", "a new name"]


def test_a_damaged_patch_is_named(mbox):
    text = mbox.read_text()
    at = text.index("@@ -")
    mbox.write_text(text[:at] + text[at:].replace("\n ", "\n", 1))
    with pytest.raises(LabInputError, match=r"mail 2 holds a patch that git cannot .*: one\n.*corrupt patch"):
        read_mailbox(mbox)


def test_a_patch_that_is_missing_is_told(mbox):
    assert (read_mailbox(mbox).count, str(read_mailbox(mbox))) == (3, "")
    mails = mbox.read_text().split("From ")
    mbox.write_text("From ".join([*mails[:2], mails[3]]))
    assert str(read_mailbox(mbox)) == "without patches 1, 3 of 3"
    mbox.write_text("From ".join([*mails[:2], mails[3], mails[2]]))
    with pytest.raises(LabInputError, match=r"holds the patches 2, 1 in this order: `b4 am` sorts a series"):
        read_mailbox(mbox)
    mbox.write_text("From ".join([*mails[:2], mails[3]]).replace("[PATCH 2/3]", "[PATCH]"))
    assert str(read_mailbox(mbox)) == ""


def test_a_compressed_mailbox(mbox):
    mbox.write_bytes(gzip.compress(mbox.read_bytes()))
    with pytest.raises(LabInputError, match="is compressed: gunzip it"):
        read_mailbox(mbox)


@pytest.mark.parametrize("content", ["", "hello\n", "From x\nSubject: y\n\nno diff here\n"])
def test_a_file_that_is_no_mailbox(series, tmp_path, content):
    series.git("reset", "--quiet", "--hard", "base")
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(LabInputError, match="holds no patch by mail"):
        applied(series, path)
    with pytest.raises(LabInputError, match="No such file"):
        applied(series, tmp_path / "nowhere")
