// Preloaded into a server, keeps beside its data what a power failure at this instant would leave of it: of
// each file what was there when it was last synced, under a name that its directory was last synced with.
//
// POWER_ROOT is the directory that is watched, POWER_SHADOW the one that is kept; without them, nothing is
// done. A file that was synced under a name that was not is in POWER_SHADOW.pending, which a failure takes.
// Once a file of the name POWER_SHADOW.kill is there, the process dies before the next sync of the catalog's
// log: its commit is written then, a server that starts again finds it, and a power failure takes it. While
// POWER_SHADOW.fail is there, syncs of the log fail.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void make_parents(char *path) {
  for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
    *slash = '\0';
    mkdir(path, 0750);
    *slash = '/';
  }
}

static int copy_file(const char *from, const char *to) {
  static char buffer[1 << 16];
  int source = open(from, O_RDONLY | O_CLOEXEC);
  int target = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
  ssize_t count = -1;
  while (source >= 0 && target >= 0 && (count = read(source, buffer, sizeof buffer)) > 0) {
    if (write(target, buffer, (size_t)count) != count) {
      abort();
    }
  }
  close(source);
  close(target);
  return count == 0;
}

static void keep_file(const char *path, const char *name, const char *shadow) {
  char copy[PATH_MAX], kept[PATH_MAX], pending[PATH_MAX];
  snprintf(copy, sizeof copy, "%s.pending%s.copy", shadow, name);
  snprintf(kept, sizeof kept, "%s%s", shadow, name);
  snprintf(pending, sizeof pending, "%s.pending%s", shadow, name);
  make_parents(copy);
  make_parents(kept);
  if (copy_file(path, copy)) {
    rename(copy, access(kept, F_OK) == 0 ? kept : pending);
  }
}

static void keep_new_names(const char *path, const char *pending, const char *kept) {
  char from[PATH_MAX], to[PATH_MAX];
  DIR *directory = opendir(path);
  for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
    if (entry->d_type == DT_REG) {
      snprintf(from, sizeof from, "%s/%s", pending, entry->d_name);
      snprintf(to, sizeof to, "%s/%s", kept, entry->d_name);
      rename(from, to);
    }
  }
  if (directory != NULL) {
    closedir(directory);
  }
}

static void drop_old_names(const char *path, const char *kept) {
  char there[PATH_MAX], old[PATH_MAX];
  DIR *directory = opendir(kept);
  for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
    snprintf(there, sizeof there, "%s/%s", path, entry->d_name);
    snprintf(old, sizeof old, "%s/%s", kept, entry->d_name);
    if (entry->d_type == DT_REG && access(there, F_OK) != 0) {
      unlink(old);
    }
  }
  if (directory != NULL) {
    closedir(directory);
  }
}

static void keep_names(const char *path, const char *name, const char *shadow) {
  char kept[PATH_MAX], pending[PATH_MAX];
  snprintf(kept, sizeof kept, "%s%s", shadow, name);
  snprintf(pending, sizeof pending, "%s.pending%s", shadow, name);
  keep_new_names(path, pending, kept);
  drop_old_names(path, kept);
}

static int is_asked(const char *shadow, const char *what) {
  char asked[PATH_MAX];
  snprintf(asked, sizeof asked, "%s.%s", shadow, what);
  return access(asked, F_OK) == 0;
}

// Whether this sync is to fail; does not return where the process is to die instead.
static int trouble(const char *name, const char *shadow) {
  const char *end = strrchr(name, '-');
  if (end == NULL || strcmp(end, "-wal") != 0) {
    return 0;
  }
  if (is_asked(shadow, "kill")) {
    kill(getpid(), SIGKILL);
  }
  return is_asked(shadow, "fail");
}

static int keep(int descriptor) {
  static volatile int busy;
  const char *root = getenv("POWER_ROOT"), *shadow = getenv("POWER_SHADOW");
  char link[64], path[PATH_MAX];
  struct stat status;
  if (root == NULL || shadow == NULL) {
    return 0;
  }
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0 || fstat(descriptor, &status) != 0) {
    return 0;
  }
  path[size] = '\0';
  if (strncmp(path, root, strlen(root)) != 0) {
    return 0;
  }
  const char *name = path + strlen(root);
  if (trouble(name, shadow)) {
    errno = EIO;
    return -1;
  }
  // Objects and catalog are synced by threads of their own.
  while (__sync_lock_test_and_set(&busy, 1)) {
    usleep(50);
  }
  if (S_ISDIR(status.st_mode)) {
    keep_names(path, name, shadow);
  } else {
    keep_file(path, name, shadow);
  }
  __sync_lock_release(&busy);
  return 0;
}

int fsync(int descriptor) {
  return keep(descriptor) == 0 ? (int)syscall(SYS_fsync, descriptor) : -1;
}

int fdatasync(int descriptor) {
  return keep(descriptor) == 0 ? (int)syscall(SYS_fdatasync, descriptor) : -1;
}
