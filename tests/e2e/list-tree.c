// SPDX-License-Identifier: Apache-2.0
// list-tree DIR: a line for each thing below DIR, with all that an image has to keep of it; two trees that print the same
// are the same. With no DIR it is a guest agent that leaves a mark.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

static void print_quoted(const char* text, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    unsigned char c = (unsigned char)text[i];
    printf(c > ' ' && c < 127 && c != '\\' ? "%c" : "\\%02x", c);
  }
}

static int by_name(const struct dirent** a, const struct dirent** b) { return strcmp((*a)->d_name, (*b)->d_name); }
static int by_text(const void* a, const void* b) { return strcmp(*(char* const*)a, *(char* const*)b); }

static void print_attributes(const char* path) {
  char names[65536], value[65536];
  char* sorted[256];
  int count = 0;
  ssize_t size = llistxattr(path, names, sizeof names);
  for (char* name = names; size > 0 && name < names + size && count < 256; name += strlen(name) + 1) sorted[count++] = name;
  qsort(sorted, (size_t)count, sizeof *sorted, by_text);
  for (int i = 0; i < count; ++i) {
    if (strncmp(sorted[i], "trusted.overlay", 15) == 0) continue;
    size = lgetxattr(path, sorted[i], value, sizeof value);
    printf(" %s=", sorted[i]);
    print_quoted(value, size < 0 ? 0 : (size_t)size);
  }
}

static void list(const char* path, const char* shown) {
  struct stat status;
  if (lstat(path, &status) != 0) {
    printf("%s: %s\n", shown, strerror(errno));
    return;
  }
  print_quoted(shown, strlen(shown));
  printf(" mode=%o owner=%u:%u mtime=%lld.%09ld", status.st_mode, status.st_uid, status.st_gid,
         (long long)status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
  if (!S_ISDIR(status.st_mode)) printf(" names=%lu", (unsigned long)status.st_nlink);
  if (S_ISCHR(status.st_mode) || S_ISBLK(status.st_mode)) printf(" device=%u:%u", major(status.st_rdev), minor(status.st_rdev));
  if (S_ISLNK(status.st_mode)) {
    char target[4097];
    ssize_t size = readlink(path, target, sizeof target);
    printf(" target=");
    print_quoted(target, size < 0 ? 0 : (size_t)size);
  }
  if (S_ISREG(status.st_mode)) {
    unsigned long hash = 14695981039346656037ul;  // FNV-1a
    static unsigned char buffer[1 << 16];
    int fd = open(path, O_RDONLY | O_NOFOLLOW);
    for (ssize_t size; (size = read(fd, buffer, sizeof buffer)) > 0;)
      for (ssize_t i = 0; i < size; ++i) hash = (hash ^ buffer[i]) * 1099511628211ul;
    close(fd);
    printf(" size=%lld content=%016lx", (long long)status.st_size, hash);
  }
  print_attributes(path);
  printf("\n");
  if (!S_ISDIR(status.st_mode)) return;
  struct dirent** entries;
  int count = scandir(path, &entries, NULL, by_name);
  for (int i = 0; i < count; ++i) {
    if (strcmp(entries[i]->d_name, ".") == 0 || strcmp(entries[i]->d_name, "..") == 0) continue;
    char *below, *shown_below;
    if (asprintf(&below, "%s/%s", path, entries[i]->d_name) < 0 || asprintf(&shown_below, "%s/%s", shown, entries[i]->d_name) < 0)
      exit(1);
    list(below, shown_below);
    free(below), free(shown_below);
  }
}

int main(int count, char** arguments) {
  if (count == 2) {
    list(arguments[1], ".");
    return 0;
  }
  FILE* mark = fopen("/root/agent-mark", "a"); // the initrd starts the agent and so does the image's init: a line of each
  if (!mark) return 1;
  fprintf(mark, "agent ran under %d\n", getppid());
  fclose(mark);
  pause();
}
