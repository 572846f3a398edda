"""Limits that a process puts on itself for good before it runs code of others: resources and system calls."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct

DESCRIPTORS = 64
THREADS = 64

# System calls that start processes, reach other processes, make memory that RLIMIT_AS does not count, open sockets, change mounts
# and namespaces, or are rarely needed and often attacked. Threads stay allowed.
_SHARED_NUMBERS = [424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 442, 447]  # pidfd, io_uring, mounts, memfd_secret
DENIED = {
    "x86_64": [
        *(57, 58, 59, 322),  # fork, vfork, execve, execveat
        *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
        *(29, 30, 31, 67, 64, 68, 69, 240, 319),  # shm*, semget, msgget, msgsnd, mq_open, memfd_create
        *(41, 321, 298, 323, 248, 249, 250),  # socket, bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl
        *(272, 308, 165, 166, 155, 161, 303, 304),  # unshare, setns, mount, umount2, pivot_root, chroot, *_handle_at
        *(135, 175, 246, 313),  # personality, init_module, kexec_load, finit_module
    ],
    "aarch64": [
        *(221, 281),
        *(117, 270, 271, 272),
        *(194, 195, 196, 197, 190, 186, 189, 180, 279),
        *(198, 280, 241, 282, 217, 218, 219),
        *(97, 268, 40, 39, 41, 51, 264, 265),
        *(92, 105, 104, 273),
    ],
}
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def confine(limits: dict[str, int]) -> None:
    """Limits this process for good: memory, CPU time, size of files, threads, descriptors, system calls.

    Args:
        limits: `memory_bytes`, `cpu_seconds`, `output_bytes`.
    """
    for what, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_NPROC, THREADS),  # the kernel does not apply it to root, whose threads RLIMIT_AS limits
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    _filter_system_calls()


def _filter_system_calls() -> None:
    """Installs a seccomp filter, which nothing removes: processes cannot be started, sockets cannot be opened."""
    machine = os.uname().machine
    load, equal, has_bits, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF: ld [k], jeq k, jset k, jge k, ret k
    refuse, missing, allow, kill = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCHITECTURE[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # the numbers of its x32 interface begin here
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for number in (*DENIED[machine], *_SHARED_NUMBERS):
        program += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, missing)]  # its flags are behind a pointer; libc then calls clone
    program += [(equal, 0, 3, CLONE[machine]), (load, 0, 0, 16), (has_bits, 1, 0, 0x00010000), (give, 0, 0, refuse)]  # CLONE_THREAD
    program += [(give, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if prctl(no_new_privileges, 1, 0, 0, 0) or prctl(set_seccomp, filter_mode, ctypes.byref(whole), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp cannot be used")


def probe(channel, start: dict) -> None:
    """Reports what is possible and must not be, after `confine`; and the environment."""
    confine(start["limits"])
    possible = []

    def attempt(what: str, action) -> None:
        try:
            action()
            possible.append(what)
        except (OSError, ImportError, MemoryError):
            pass

    def read_canary() -> None:
        with open(start["canary"]) as file:
            file.read()

    def write(folder: str) -> None:
        path = os.path.join(folder, f"grpo_jax_probe_{os.getpid()}")
        with open(path, "x"):
            os.remove(path)

    def connect() -> None:
        import socket

        socket.socket()

    attempt("it reads a file of this machine", read_canary)
    for folder in ("/", "/tmp", "/usr", os.path.dirname(os.__file__)):
        attempt(f"it writes to {folder}", lambda folder=folder: write(folder))
    attempt("it opens a socket", connect)
    attempt("it starts a process", lambda: os._exit(0) if os.fork() == 0 else None)
    attempt("it allocates more memory than allowed", lambda: bytearray(2 * start["limits"]["memory_bytes"]))
    channel.send(ready=True)
    channel.send(possible=possible, environment=sorted(os.environ), canary_present=os.path.exists(start["canary"]))
