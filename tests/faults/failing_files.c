/* Preloaded (LD_PRELOAD): calls on files whose path holds a given text fail a given number of times, then work.

   HVDTRAIN_FAULTS="CALL TEXT ERRNO SKIP TIMES; ..."   CALL: of the names below, * for all; SKIP: such calls that work before
   HVDTRAIN_FAULTS_LOG=FILE                          a line for each call that failed: CALL PATH                              */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

struct rule { char call[16], text[256]; int number, skip, times; };
static struct rule rules[32];
static int count = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

static void note(const char *call, const char *path) {
    const char *name = getenv("HVDTRAIN_FAULTS_LOG");
    FILE *log = name ? fopen(name, "a") : NULL;
    if (log) { fprintf(log, "%s %s\n", call, path); fclose(log); }
}

static int fails(const char *call, const char *path) {
    int number = 0;
    if (inside || !path) return 0;
    inside = 1;
    pthread_mutex_lock(&lock);
    if (count < 0) {
        char *text = strdup(getenv("HVDTRAIN_FAULTS") ? getenv("HVDTRAIN_FAULTS") : ""), *rest = text, *one;
        for (count = 0; count < 32 && (one = strsep(&rest, ";"));) {
            struct rule *r = &rules[count];
            if (sscanf(one, " %15s %255s %d %d %d", r->call, r->text, &r->number, &r->skip, &r->times) == 5) count++;
        }
        free(text);
    }
    for (int i = 0; i < count && !number; i++) {
        struct rule *r = &rules[i];
        if ((strcmp(r->call, "*") && strcmp(r->call, call)) || !strstr(path, r->text)) continue;
        if (r->skip > 0) r->skip--;
        else if (r->times > 0) { r->times--; number = r->number; }
    }
    if (number) note(call, path);
    pthread_mutex_unlock(&lock);
    inside = 0;
    if (number) errno = number;
    return number;
}

static int handle_fails(const char *call, int handle) {
    char link[64], path[PATH_MAX];
    if (inside) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(call, path);
}

static const char *whole(int folder, const char *path, char *joined) {  /* of a path that is relative to a folder */
    char link[64];
    if (!path || path[0] == '/' || folder == AT_FDCWD) return path;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, joined, PATH_MAX - 1);
    if (size < 0) return path;
    snprintf(joined + size, PATH_MAX - size, "/%s", path);
    return joined;
}

#define MODE int mode = 0; if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }
#define OPEN(name) int name(const char *path, int flags, ...) { REAL(name); MODE return fails("open", path) ? -1 : real(path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { REAL(name); MODE char joined[PATH_MAX]; \
    return fails("open", whole(folder, path, joined)) ? -1 : real(folder, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)
#define STAT(name, type) int name(const char *path, struct type *found) { REAL(name); return fails("stat", path) ? -1 : real(path, found); }
STAT(stat, stat) STAT(lstat, stat) STAT(stat64, stat64) STAT(lstat64, stat64)
#define STATAT(name, type) int name(int folder, const char *path, struct type *found, int flags) { REAL(name); char joined[PATH_MAX]; \
    return fails("stat", whole(folder, path, joined)) ? -1 : real(folder, path, found, flags); }
STATAT(fstatat, stat) STATAT(fstatat64, stat64)
DIR *opendir(const char *path) { REAL(opendir); return fails("list", path) ? NULL : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails("mkdir", path) ? -1 : real(path, mode); }
int unlink(const char *path) { REAL(unlink); return fails("unlink", path) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return fails("unlink", path) ? -1 : real(path); }
int rename(const char *old, const char *new) { REAL(rename); return fails("rename", new) ? -1 : real(old, new); }
int chmod(const char *path, mode_t mode) { REAL(chmod); return fails("chmod", path) ? -1 : real(path, mode); }
ssize_t write(int handle, const void *content, size_t size) { REAL(write); return handle_fails("write", handle) ? -1 : real(handle, content, size); }
ssize_t pwrite(int handle, const void *content, size_t size, off_t at) { REAL(pwrite); return handle_fails("write", handle) ? -1 : real(handle, content, size, at); }
ssize_t read(int handle, void *content, size_t size) { REAL(read); return handle_fails("read", handle) ? -1 : real(handle, content, size); }
int fsync(int handle) { REAL(fsync); return handle_fails("fsync", handle) ? -1 : real(handle); }
int flock(int handle, int how) { REAL(flock); return handle_fails("flock", handle) ? -1 : real(handle, how); }
