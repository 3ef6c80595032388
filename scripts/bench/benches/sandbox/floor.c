/* The floor: what a sandbox costs when nothing but system calls is left, for scripts/bench/sandbox.
 *
 * It makes sandboxes as skyrl_minisandbox/sandbox/ does: a launcher process that lives on, one clone3 with every
 * namespace, an overlay on tmpfs over the same id-mapped layer, the same mounts (the benchmark reads them off one of our
 * sandboxes and hands them over in the plan), the same capabilities, the same filter program, the same cgroup
 * hierarchies and limits, pivot_root. Then a bash on two pipes. No wire, no verification, no kept state, no Python.
 *
 *   floor PLAN     lines on standard input: create | echo | true | close | rate N WIDTH | hold N | answer | drop
 *                  one line of answer each: seconds; `hold` adds the pids of the inits and of the shells
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))
#define TOKEN "floor-is-here"
enum { BOXES = 4096, PLAN = 256 };

struct attributes { uint64_t set, clear, propagation, userns; }; /* struct mount_attr */
enum { ATTR_RDONLY = 1, ATTR_IDMAP = 0x00100000 };

static void die(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static long check(long result, const char *what) {
    if (result < 0) die(what);
    return result;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* The plan: one line an entry, fields parted by tabs. */

struct entry { char *field[6]; };
static struct entry mounts[PLAN], limits[PLAN];
static char *cgroups[8], *layer = "", *disk = "0";
static int mount_count, limit_count, cgroup_count;
static long base;
static uint64_t capabilities;
static struct sock_fprog program;

static void load_filter(const char *path) {
    static struct sock_filter filter[4096];
    int fd = check(open(path, O_RDONLY | O_CLOEXEC), path);
    long size = check(read(fd, filter, sizeof filter), path);
    close(fd);
    program.len = size / sizeof *filter;
    program.filter = filter;
}

static void load_plan(const char *path) {
    static char line[8192];
    FILE *file = fopen(path, "re");
    if (!file) die(path);
    while (fgets(line, sizeof line, file)) {
        struct entry entry = {{0}};
        char *rest = strdup(line);
        rest[strcspn(rest, "\n")] = 0;
        for (unsigned i = 0; i < LENGTH(entry.field); i++) entry.field[i] = rest ? strsep(&rest, "\t") : "";
        char *kind = entry.field[0], *value = entry.field[1];
        if (!strcmp(kind, "layer")) layer = value;
        else if (!strcmp(kind, "base")) base = atol(value);
        else if (!strcmp(kind, "disk")) disk = value;
        else if (!strcmp(kind, "capabilities")) capabilities = strtoull(value, NULL, 16);
        else if (!strcmp(kind, "filter")) load_filter(value);
        else if (!strcmp(kind, "cgroup")) cgroups[cgroup_count++] = value;
        else if (!strcmp(kind, "limit")) limits[limit_count++] = entry;
        else mounts[mount_count++] = entry;
    }
    fclose(file);
}

/* Init: process 1 of a sandbox. */

static void write_file(const char *path, const char *text) {
    int fd = check(open(path, O_WRONLY | O_CLOEXEC), path);
    check(write(fd, text, strlen(text)), path);
    close(fd);
}

static void set_capabilities(void) {
    for (int i = 0; i < 64; i++)
        if (!(capabilities >> i & 1) && prctl(PR_CAPBSET_DROP, i, 0, 0, 0) < 0) break;
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    uint32_t low = capabilities, high = capabilities >> 32;
    struct __user_cap_data_struct data[2] = {{low, low, 0}, {high, high, 0}};
    check(syscall(SYS_capset, &header, data), "capset");
}

static void do_mount(struct entry *entry) {
    char **field = entry->field, target[512], source[512];
    unsigned long flags = strtoul(field[3], NULL, 0);
    snprintf(target, sizeof target, "/m%s", field[1]);
    snprintf(source, sizeof source, "/host%s", field[2]);
    if (!strcmp(field[0], "bind")) {
        if (access(target, F_OK)) close(check(open(target, O_CREAT | O_CLOEXEC, 0666), target));
        check(mount(source, target, NULL, MS_BIND, NULL), target);
    } else if (!strcmp(field[0], "read-only")) {
        check(mount(target, target, NULL, MS_BIND | MS_REC, NULL), target);
        check(mount(NULL, target, NULL, MS_BIND | MS_REMOUNT | flags, NULL), target);
    } else if (!strcmp(field[0], "link")) {
        check(symlink(field[2], target), target);
    } else {
        mkdir(target, 0755);
        check(mount(field[0], target, field[0], flags, field[4]), target);
    }
}

static void start_bash(int in, int out) {
    if (check(fork(), "fork")) return;
    setsid();
    int null = open("/dev/null", O_RDWR);
    dup2(in, 0), dup2(out, 1), dup2(null, 2);
    syscall(SYS_close_range, 3u, ~0u, 0);
    signal(SIGPIPE, SIG_DFL);
    struct rlimit files = {16384, 16384};
    setrlimit(RLIMIT_NOFILE, &files);
    check(chdir("/"), "/");
    char *argv[] = {"bash", "--noprofile", "--norc", NULL};
    char *env[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=dumb",
                   "LANG=C.UTF-8", NULL};
    execvpe("bash", argv, env);
    die("bash");
}

static void be_init(int go, int root, int in, int out) {
    char byte;
    int keep[] = {go, root, in, out}, first = 3;
    for (int done = 0; !done;) { /* close what lies between the descriptors that stay */
        int next = INT32_MAX;
        for (unsigned i = 0; i < LENGTH(keep); i++)
            if (keep[i] >= first && keep[i] < next) next = keep[i];
        done = next == INT32_MAX;
        if (next > first) syscall(SYS_close_range, first, done ? ~0u : (unsigned)next - 1, 0);
        first = next == INT32_MAX ? next : next + 1;
    }
    if (read(go, &byte, 1) != 1) _exit(1);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    check(setresgid(0, 0, 0), "setresgid");
    check(setresuid(0, 0, 0), "setresuid");
    setgroups(0, NULL);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (cgroup_count) check(unshare(CLONE_NEWCGROUP), "cgroup namespace");
    check(sethostname("sandbox", 7), "sethostname");
    int sock = check(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
    struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    check(ioctl(sock, SIOCSIFFLAGS, &lo), "loopback");
    close(sock);
    check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "private mounts");
    check(syscall(SYS_move_mount, root, "", AT_FDCWD, "/m", 4), "move_mount");
    for (int i = 0; i < mount_count; i++) do_mount(&mounts[i]);
    chmod("/m/tmp", 01777);
    check(chdir("/m"), "/m");
    check(syscall(SYS_pivot_root, ".", "."), "pivot_root");
    check(umount2(".", MNT_DETACH), "umount");
    check(chdir("/"), "/");
    struct rlimit core = {0, 0};
    setrlimit(RLIMIT_CORE, &core);
    set_capabilities();
    check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
    check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0), "seccomp");
    start_bash(in, out);
    close(in), close(out);
    for (;;)
        if (wait(NULL) < 0) pause();
}

/* The launcher: SOCK_SEQPACKET, a request 'c' or 'd' with a box, an answer with the box and two descriptors. */

struct message { int kind, box, pid; };
struct box { int pid, pidfd, upper, used; };
static struct box boxes[BOXES];
static int control, idmap = -1;

static void send_message(int sock, struct message message, int *fds, int count) {
    char space[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec part = {&message, sizeof message};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        header.msg_control = space;
        header.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&header);
        *c = (struct cmsghdr){CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(c), fds, count * sizeof(int));
    }
    check(sendmsg(sock, &header, MSG_NOSIGNAL), "sendmsg");
}

static int receive_message(int sock, struct message *message, int *fds) {
    char space[CMSG_SPACE(2 * sizeof(int))];
    struct iovec part = {message, sizeof *message};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    if (recvmsg(sock, &header, MSG_CMSG_CLOEXEC) <= 0) return 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&header);
    if (c && fds) memcpy(fds, CMSG_DATA(c), 2 * sizeof(int));
    return 1;
}

static void map_ids(int pid) {
    char path[64], text[64];
    snprintf(text, sizeof text, "0 %ld 65536", base);
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "/host/proc/%d/%cid_map", pid, "ug"[i]);
        write_file(path, text);
    }
}

static int clone_into(uint64_t flags, int *pidfd, int cgroup) {
    struct clone_args arguments = {.flags = flags | CLONE_PIDFD, .pidfd = (uintptr_t)pidfd, .exit_signal = SIGCHLD};
    if (cgroup >= 0) arguments.flags |= CLONE_INTO_CGROUP, arguments.cgroup = cgroup;
    return check(syscall(SYS_clone3, &arguments, sizeof arguments), "clone3");
}

static void enter(void) {
    check(unshare(CLONE_NEWNS), "unshare");
    check(mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL), "slave");
    check(mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=4m"), "tmpfs");
    char *names[] = {"/tmp/host", "/tmp/l", "/tmp/s", "/tmp/x", "/tmp/m"};
    for (unsigned i = 0; i < LENGTH(names); i++) mkdir(names[i], 0755);
    check(syscall(SYS_pivot_root, "/tmp", "/tmp/host"), "pivot_root");
    check(chdir("/"), "/");

    int hold[2], pidfd;
    check(pipe2(hold, O_CLOEXEC), "pipe");
    int pid = clone_into(CLONE_NEWUSER, &pidfd, -1);
    char path[4200], byte;
    if (!pid) {
        close(hold[1]);
        _exit(read(hold[0], &byte, 1) != 0);
    }
    map_ids(pid);
    snprintf(path, sizeof path, "/host/proc/%d/ns/user", pid);
    idmap = check(open(path, O_RDONLY | O_CLOEXEC), path);
    close(hold[0]), close(hold[1]), close(pidfd);
    waitpid(pid, NULL, 0);

    snprintf(path, sizeof path, "/host%s", layer);
    int tree = check(syscall(SYS_open_tree, AT_FDCWD, path, 1 | O_CLOEXEC), path);
    struct attributes attributes = {ATTR_RDONLY | ATTR_IDMAP, 0, 0, idmap};
    if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes)) {
        attributes = (struct attributes){ATTR_RDONLY, 0, 0, 0}; /* as ours: owners were shifted then */
        check(syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes), "mount_setattr");
    }
    check(syscall(SYS_move_mount, tree, "", AT_FDCWD, "/l", 4), "layer");
    close(tree);
}

static int mount_overlay(int number, int *upper) {
    char stage[64], path[128], options[512];
    snprintf(stage, sizeof stage, "/s/%d", number);
    check(mkdir(stage, 0755), stage);
    snprintf(options, sizeof options, "mode=755,size=%s", disk);
    check(mount("tmpfs", stage, "tmpfs", MS_NOSUID | MS_NODEV, options), stage);
    char *names[] = {"upper", "work"};
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", stage, names[i]);
        check(mkdir(path, 0755), path);
        check(chown(path, base, base), path);
    }
    snprintf(options, sizeof options,
             "lowerdir=l,upperdir=s/%d/upper,workdir=s/%d/work,volatile,index=off,metacopy=off,redirect_dir=off",
             number, number);
    check(mount("overlay", "/x", "overlay", MS_NOSUID | MS_NODEV, options), "overlay");
    int fd = check(syscall(SYS_open_tree, AT_FDCWD, "/x", 1 | O_CLOEXEC), "/x");
    *upper = check(open(stage, O_RDONLY | O_DIRECTORY | O_CLOEXEC), stage);
    check(umount2("/x", MNT_DETACH), "/x");
    check(umount2(stage, MNT_DETACH), stage);
    rmdir(stage);
    return fd;
}

static void cgroup_path(char *path, size_t size, int which, int box) {
    snprintf(path, size, "/host%s/%d", cgroups[which], box);
}

static void create(int box) {
    static int count;
    char path[4200], full[4400];
    int into = -1;
    int in[2], out[2], go[2], joins[8], upper, pidfd;
    check(pipe2(in, O_CLOEXEC), "pipe"), check(pipe2(out, O_CLOEXEC), "pipe"), check(pipe2(go, O_CLOEXEC), "pipe");
    int root = mount_overlay(++count, &upper);
    for (int i = 0; i < cgroup_count; i++) {
        cgroup_path(path, sizeof path, i, box);
        check(mkdir(path, 0755), path);
        for (int j = 0; j < limit_count; j++)
            if (atoi(limits[j].field[1]) == i) {
                snprintf(full, sizeof full, "%s/%s", path, limits[j].field[2]);
                write_file(full, limits[j].field[3]);
            }
        /* A thread that moves itself does not take the lock that costs a grace period of RCU (cgroup_procs_write_start). */
        snprintf(full, sizeof full, "%s/tasks", path);
        joins[i] = open(full, O_WRONLY | O_CLOEXEC);
        if (joins[i] < 0) into = joins[i] = check(open(path, O_PATH | O_DIRECTORY | O_CLOEXEC), path);
    }
    int pid = clone_into(
        CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET, &pidfd, into);
    if (!pid) {
        for (int i = 0; i < cgroup_count; i++)
            if (joins[i] != into) check(write(joins[i], "0", 1), "join");
        be_init(go[0], root, in[0], out[1]);
    }
    for (int i = 0; i < cgroup_count; i++) close(joins[i]);
    map_ids(pid);
    check(write(go[1], "g", 1), "go");
    boxes[box] = (struct box){pid, pidfd, upper, 1};
    int fds[] = {in[1], out[0]};
    send_message(control, (struct message){'c', box, pid}, fds, 2);
    int ours[] = {root, in[0], in[1], out[0], out[1], go[0], go[1]};
    for (unsigned i = 0; i < LENGTH(ours); i++) close(ours[i]);
}

static void reap(void) {
    int pid;
    char path[4200];
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        for (int box = 0; box < BOXES; box++)
            if (boxes[box].used && boxes[box].pid == pid) {
                close(boxes[box].pidfd), close(boxes[box].upper);
                for (int i = 0; i < cgroup_count; i++) cgroup_path(path, sizeof path, i, box), rmdir(path);
                boxes[box].used = 0;
                send_message(control, (struct message){'d', box, pid}, NULL, 0);
            }
}

static void launcher(void) {
    sigset_t chld;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, NULL);
    int ended = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    enter();
    struct pollfd polled[] = {{control, POLLIN, 0}, {ended, POLLIN, 0}};
    for (;;) {
        poll(polled, 2, -1);
        if (polled[1].revents) {
            struct signalfd_siginfo info;
            while (read(ended, &info, sizeof info) > 0) {}
            reap();
        }
        if (polled[0].revents) {
            struct message message;
            if (!receive_message(control, &message, NULL)) break;
            if (message.kind == 'c') create(message.box);
            else syscall(SYS_pidfd_send_signal, boxes[message.box].pidfd, SIGKILL, NULL, 0);
        }
    }
    for (int box = 0; box < BOXES; box++)
        if (boxes[box].used) kill(boxes[box].pid, SIGKILL);
    while (wait(NULL) > 0) {}
    char path[4200];
    for (int box = 0; box < BOXES; box++)
        for (int i = 0; boxes[box].used && i < cgroup_count; i++) cgroup_path(path, sizeof path, i, box), rmdir(path);
    _exit(0);
}

/* The owner: asks the launcher, and takes the time. */

struct seat { int in, out, pid; };
static struct seat seats[BOXES];

static void ask_create(int box) { send_message(control, (struct message){'c', box, 0}, NULL, 0); }
static void ask_destroy(int box) {
    close(seats[box].in), close(seats[box].out);
    send_message(control, (struct message){'d', box, 0}, NULL, 0);
}

static struct message answered(void) {
    struct message message;
    int fds[2];
    if (!receive_message(control, &message, fds)) die("the launcher has ended");
    if (message.kind == 'c') seats[message.box] = (struct seat){fds[0], fds[1], message.pid};
    return message;
}

static void say(int box, const char *command) { check(write(seats[box].in, command, strlen(command)), "bash"); }
static void hear(int box) {
    char text[64];
    if (read(seats[box].out, text, sizeof text) < (long)sizeof TOKEN || memcmp(text, TOKEN, sizeof TOKEN - 1))
        errno = EPROTO, die("bash did not answer");
}

#define ECHO "echo " TOKEN "\n"

static void rate(int count, int width) {
    static struct pollfd polled[BOXES];
    int begun = 0, done = 0;
    for (; begun < width && begun < count; begun++) ask_create(begun);
    for (int i = 0; i < width; i++) polled[i] = (struct pollfd){-1, POLLIN, 0};
    polled[width] = (struct pollfd){control, POLLIN, 0};
    while (done < count) {
        poll(polled, width + 1, -1);
        for (int i = 0; i < width; i++)
            if (polled[i].fd >= 0 && polled[i].revents) {
                hear(i);
                polled[i].fd = -1;
                ask_destroy(i);
            }
        if (!polled[width].revents) continue;
        struct message message = answered();
        if (message.kind == 'c') {
            say(message.box, ECHO);
            polled[message.box].fd = seats[message.box].out;
        } else {
            done++;
            if (begun < count) begun++, ask_create(message.box);
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    load_plan(argv[1]);
    int pair[2];
    check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), "socketpair");
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (!check(fork(), "fork")) {
        control = pair[1];
        close(pair[0]);
        close(0), close(1);
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        launcher();
    }
    close(pair[1]);
    control = pair[0];
    char line[256];
    int held = 0;
    while (fgets(line, sizeof line, stdin)) {
        char word[32] = "";
        int number = 0, width = 0;
        sscanf(line, "%31s %d %d", word, &number, &width);
        double start = now();
        if (!strcmp(word, "create")) {
            ask_create(0);
            answered();
            say(0, ECHO);
            hear(0);
        } else if (!strcmp(word, "echo")) {
            say(0, ECHO);
            hear(0);
        } else if (!strcmp(word, "true")) {
            say(0, "/bin/true; " ECHO);
            hear(0);
        } else if (!strcmp(word, "close")) {
            ask_destroy(0);
            answered();
        } else if (!strcmp(word, "rate")) {
            rate(number, width);
        } else if (!strcmp(word, "hold")) {
            for (; held < number; held++) ask_create(held), answered(), say(held, ECHO), hear(held);
        } else if (!strcmp(word, "answer")) {
            for (int i = 0; i < held; i++) say(i, ECHO);
            for (int i = 0; i < held; i++) hear(i);
        } else if (!strcmp(word, "drop")) {
            for (; held > 0; held--) ask_destroy(held - 1), answered();
        } else {
            return 2;
        }
        printf("%.9f", now() - start);
        if (!strcmp(word, "hold"))
            for (int i = 0; i < held; i++) printf(" %d", seats[i].pid);
        printf("\n");
        fflush(stdout);
    }
    close(control);
    while (wait(NULL) > 0) {}
    return 0;
}
