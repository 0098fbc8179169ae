/* Fails a chosen system call on the files under a folder, or kills the process there; loaded with LD_PRELOAD.

   The variables are read when the process starts, and when `faults_configure` is called.

   FAULT_FOLDER   prefix of the paths that count
   FAULT_AT       number of the call that fails, from 1; 0 counts only
   FAULT_ERRNO    error of that call and, if FAULT_LASTS is 1, of all later ones; 0 kills the process with SIGKILL
   FAULT_CALLS    letters of the calls that count: o open for writing, r open for reading, w write, s fsync, n rename or
                  link, m mkdir, u unlink or rmdir, t truncate
   FAULT_LOG      file to which each counted call is appended, one line per call

   A killed write has written the first half of its bytes. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long count;
static const char *folder, *calls;
static long at, error, lasts;
static int record = -1;

__attribute__((constructor)) void faults_configure(void) {
  const char *text;
  count = 0;
  folder = getenv("FAULT_FOLDER");
  calls = (text = getenv("FAULT_CALLS")) ? text : "";
  at = (text = getenv("FAULT_AT")) ? atol(text) : 0;
  error = (text = getenv("FAULT_ERRNO")) ? atol(text) : 0;
  lasts = (text = getenv("FAULT_LASTS")) ? atol(text) : 0;
  if (folder && (text = getenv("FAULT_LOG")))
    record = syscall(SYS_openat, AT_FDCWD, text, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

static void locate(int directory, const char *path, char *full) {
  char base[PATH_MAX] = "", link[64];
  if (path && path[0] == '/') {
    snprintf(full, PATH_MAX, "%s", path);
    return;
  }
  if (directory == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) base[0] = 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t size = readlink(link, base, sizeof base - 1);
    base[size < 0 ? 0 : size] = 0;
  }
  snprintf(full, PATH_MAX, path ? "%s/%s" : "%s", base, path);
}

/* Returns whether this call fails, with errno set; a call that is killed first writes half of its data. */
static int fails(char kind, int directory, const char *path, const void *data, size_t size) {
  char full[PATH_MAX], line[PATH_MAX + 32];
  if (!folder || !strchr(calls, kind)) return 0;
  int before = errno;
  locate(directory, path, full);
  errno = before;
  if (strncmp(full, folder, strlen(folder))) return 0;
  long number = atomic_fetch_add(&count, 1) + 1;
  int hit = at && (number == at || (lasts && number > at));
  if (record >= 0) {
    int length = snprintf(line, sizeof line, "%ld %c %s%s\n", number, kind, full, hit ? " !" : "");
    syscall(SYS_write, record, line, (size_t)length);
  }
  if (!hit) return 0;
  if (!error) {
    if (data && size > 1) syscall(SYS_write, directory, data, size / 2);
    syscall(SYS_kill, getpid(), SIGKILL);
  }
  errno = error;
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPENED(flags) (((flags) & (O_WRONLY | O_RDWR | O_CREAT)) ? 'o' : 'r')
#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list list; \
    va_start(list, flags); \
    mode = va_arg(list, mode_t); \
    va_end(list); \
  }

#define DEFINE_OPEN(name) \
  int name(const char *path, int flags, ...) { \
    MODE(flags) \
    return fails(OPENED(flags), AT_FDCWD, path, NULL, 0) ? -1 : NEXT(name)(path, flags, mode); \
  }
#define DEFINE_OPENAT(name) \
  int name(int directory, const char *path, int flags, ...) { \
    MODE(flags) \
    return fails(OPENED(flags), directory, path, NULL, 0) ? -1 : NEXT(name)(directory, path, flags, mode); \
  }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
  return fails('w', file, NULL, data, size) ? -1 : NEXT(write)(file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
  return fails('w', file, NULL, data, size) ? -1 : NEXT(pwrite)(file, data, size, offset);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
  return fails('w', file, NULL, data, size) ? -1 : NEXT(pwrite64)(file, data, size, offset);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
  int hit = fails('w', file, NULL, number ? parts[0].iov_base : NULL, number ? parts[0].iov_len : 0);
  return hit ? -1 : NEXT(writev)(file, parts, number);
}
int fsync(int file) { return fails('s', file, NULL, NULL, 0) ? -1 : NEXT(fsync)(file); }
int fdatasync(int file) { return fails('s', file, NULL, NULL, 0) ? -1 : NEXT(fdatasync)(file); }
int ftruncate(int file, off_t size) { return fails('t', file, NULL, NULL, 0) ? -1 : NEXT(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return fails('t', file, NULL, NULL, 0) ? -1 : NEXT(ftruncate64)(file, size); }
int rename(const char *from, const char *to) {
  return fails('n', AT_FDCWD, to, NULL, 0) ? -1 : NEXT(rename)(from, to);
}
int renameat(int source, const char *from, int target, const char *to) {
  return fails('n', target, to, NULL, 0) ? -1 : NEXT(renameat)(source, from, target, to);
}
int renameat2(int source, const char *from, int target, const char *to, unsigned flags) {
  return fails('n', target, to, NULL, 0) ? -1 : NEXT(renameat2)(source, from, target, to, flags);
}
int link(const char *from, const char *to) { return fails('n', AT_FDCWD, to, NULL, 0) ? -1 : NEXT(link)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails('m', AT_FDCWD, path, NULL, 0) ? -1 : NEXT(mkdir)(path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) {
  return fails('m', directory, path, NULL, 0) ? -1 : NEXT(mkdirat)(directory, path, mode);
}
int unlink(const char *path) { return fails('u', AT_FDCWD, path, NULL, 0) ? -1 : NEXT(unlink)(path); }
int unlinkat(int directory, const char *path, int flags) {
  return fails('u', directory, path, NULL, 0) ? -1 : NEXT(unlinkat)(directory, path, flags);
}
int rmdir(const char *path) { return fails('u', AT_FDCWD, path, NULL, 0) ? -1 : NEXT(rmdir)(path); }
