/* Gives a process the monotonic clock of another machine: LD_PRELOAD this library, with OTHER_CLOCK="OFFSET_S,DRIFT".

   Times that the process waits for are turned back, so that the process waits as long as it means to. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double offset, drift, start;
static int is_set;

static double seconds(const struct timespec *t) { return t->tv_sec + 1e-9 * t->tv_nsec; }

static struct timespec timespec_of(double s)
{
    struct timespec t = {(time_t)s, (long)(1e9 * (s - (time_t)s))};
    return t;
}

static void set(void)
{
    struct timespec now;
    const char *text = getenv("OTHER_CLOCK");
    if (is_set) return;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    start = seconds(&now);
    if (text) sscanf(text, "%lf,%lf", &offset, &drift);
    is_set = 1;
}

int clock_gettime(clockid_t clock, struct timespec *t)
{
    int failed = syscall(SYS_clock_gettime, clock, t);
    if (failed || clock != CLOCK_MONOTONIC) return failed;
    set();
    double now = seconds(t);
    *t = timespec_of(now + offset + drift * (now - start));
    return 0;
}

static struct timespec turned_back(const struct timespec *t)
{
    set();
    double now = (seconds(t) - offset + drift * start) / (1 + drift);
    return timespec_of(now > 0 ? now : 0);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *t, struct timespec *rest)
{
    struct timespec own = *t;
    if (clock == CLOCK_MONOTONIC && (flags & TIMER_ABSTIME)) own = turned_back(t);
    return syscall(SYS_clock_nanosleep, clock, flags, &own, rest) ? 4 /* EINTR */ : 0;
}

int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *t)
{
    int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *) = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    struct timespec own = clock == CLOCK_MONOTONIC ? turned_back(t) : *t;
    return real(cond, mutex, clock, &own);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *t)
{
    int (*real)(sem_t *, clockid_t, const struct timespec *) = dlsym(RTLD_NEXT, "sem_clockwait");
    struct timespec own = clock == CLOCK_MONOTONIC ? turned_back(t) : *t;
    return real(semaphore, clock, &own);
}
