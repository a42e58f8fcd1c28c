/* A FUSE source whose reads, writes and fsyncs take some time each, as a network file system's do.
 *
 *     gcc -O2 -Wall -I/usr/share/doc/libfuse3-dev/examples -o delayed_source delayed_source.c `pkg-config --cflags --libs fuse3`
 *     DELAY_US=500 delayed_source -f -o source=DIRECTORY MOUNTPOINT
 *
 * It is libfuse's own example passthrough_ll.c with four things changed, each from outside:
 *
 * - A delay of DELAY_US microseconds before each read, write and fsync. A thread sleeps for each, by a timer of the kernel's
 *   that is exact to some microseconds; iohang-flaky's delay is trio's, whose timers are rounded up to whole milliseconds.
 * - Up to 64 threads, where libfuse 3.12 and later have 10: as many requests can be on their way at once.
 * - max_background is 1024, where the kernel's default is 12, for the same reason.
 * - Direct writes to one file go in parallel (FOPEN_PARALLEL_DIRECT_WRITES), as on NFS, and O_DIRECT is not passed on. Linux
 *   allows the first only to handles that are FOPEN_DIRECT_IO, so this source has no page cache of its own.
 */

#define _GNU_SOURCE
#define FUSE_USE_VERSION 34

#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6) /* Linux 6.2; Debian 12 has the headers of 6.1 */
#endif

#define MOST_THREADS 64

static const struct fuse_lowlevel_ops *delayed(const struct fuse_lowlevel_ops *plain);
static int loop_with_threads(struct fuse_session *session);

#define fuse_session_new(args, ops, size, data) fuse_session_new(args, delayed(ops), size, data)
/* The example asks for the loop of libfuse 3.4, which cannot be told how many threads. */
#undef fuse_session_loop_mt
int fuse_session_loop_mt(struct fuse_session *session, struct fuse_loop_config *config);
#define fuse_session_loop_mt(session, config) ((void)(config), loop_with_threads(session))
#include "passthrough_ll.c"
#undef fuse_session_loop_mt

static struct timespec delay;

static void wait_a_while(void)
{
	static __thread int exact;

	if (!exact) { /* the kernel lets timers be 50 us late otherwise */
		prctl(PR_SET_TIMERSLACK, 1UL);
		exact = 1;
	}
	clock_nanosleep(CLOCK_MONOTONIC, 0, &delay, NULL);
}

static void delayed_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
	wait_a_while();
	lo_read(req, ino, size, offset, fi);
}

static void delayed_write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *buf, off_t offset, struct fuse_file_info *fi)
{
	wait_a_while();
	lo_write_buf(req, ino, buf, offset, fi);
}

static void delayed_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	wait_a_while();
	lo_fsync(req, ino, datasync, fi);
}

static void parallel_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	char name[64];
	struct fuse_open_out out = { .open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES };
	int fd;

	snprintf(name, sizeof(name), "/proc/self/fd/%i", lo_fd(req, ino));
	fd = open(name, fi->flags & ~(O_NOFOLLOW | O_DIRECT));
	if (fd == -1) {
		fuse_reply_err(req, errno);
		return;
	}
	out.fh = fd;
	/* libfuse 3.14 has no name for the flag, so the answer is made by hand. */
	fuse_reply_buf(req, (const char *)&out, sizeof(out));
}

static void wide_init(void *data, struct fuse_conn_info *connection)
{
	lo_init(data, connection);
	connection->max_background = 1024;
	connection->congestion_threshold = 1024;
}

static const struct fuse_lowlevel_ops *delayed(const struct fuse_lowlevel_ops *plain)
{
	static struct fuse_lowlevel_ops ops;
	const char *text = getenv("DELAY_US");
	long delay_us = text ? atol(text) : 0;

	delay.tv_sec = delay_us / 1000000;
	delay.tv_nsec = delay_us % 1000000 * 1000;
	ops = *plain;
	ops.init = wide_init;
	ops.open = parallel_open;
	ops.read = delayed_read;
	ops.write_buf = delayed_write_buf;
	ops.fsync = delayed_fsync;
	return &ops;
}

static int loop_with_threads(struct fuse_session *session)
{
	struct fuse_loop_config *config = fuse_loop_cfg_create();
	int result;

	fuse_loop_cfg_set_max_threads(config, MOST_THREADS);
	fuse_loop_cfg_set_idle_threads(config, MOST_THREADS); /* or they would come and go all the time */
	result = fuse_session_loop_mt(session, config);
	fuse_loop_cfg_destroy(config);
	return result;
}
