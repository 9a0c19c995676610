/* Runs kernels from object files on vectors from a file, between guard pages, and compares with the results in the file.
 *
 * The file (compiler/tests/aarch64.rs writes it) is a row of little-endian 64-bit words: the number of cases, the words
 * of each case in the order of struct vector, then the bytes that they point to. Every case runs twice: with all
 * buffers directly before a page that cannot be accessed, and directly after one. Inputs are read-only.
 *
 * Exit status 0: all agree. 1: the first case that does not is named on standard output. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* In the order of ternion's Argument. */
struct kernel_args {
    const void *weights;
    uint64_t tiles;
    const void *activations;
    uint64_t columns;
    const void *sums;
    void *out;
    uint64_t out_stride;
    const void *last_column;
    void *scratch;
    const void *list;
};

/* In the order of ternion's ActivationArgument. */
struct step_args {
    const void *input, *weights, *epsilon;
    void *output, *result, *scratch;
};

/* The generated table. */
struct kernel {
    void (*run)(const void *);
    const char *name;
};
extern const struct kernel kernels[];

struct vector {
    uint64_t kernel; /* one without tiles is a step: input, epsilon and column are activations, sums and results */
    uint64_t name_at, name_bytes; /* of the data */
    uint64_t weights_at, weights_bytes;
    uint64_t tiles;
    uint64_t activations_at, activations_bytes, column_bytes;
    uint64_t sums_at, columns;
    uint64_t expected_at; /* columns × m results; 0: any results will do */
    uint64_t m, rows, out_stride;
    uint64_t scratch_bytes; /* a multiple of 64, so that the scratch is aligned to 64 bytes */
    uint64_t list_at, list_bytes;
};

static const uint32_t poison = 0xa5a5a5a5;
static const uint8_t *file;
static const struct vector *now;
static const char *placement;

static void say_case(const char *what) {
    printf("%s: %s; %.*s; placement=%s\n", what, kernels[now->kernel].name, (int)now->name_bytes,
           (const char *)file + now->name_at, placement);
    fflush(stdout);
}

static void faulted(int signal) {
    say_case(signal == SIGILL ? "illegal instruction" : "access beyond a buffer");
    _exit(1);
}

struct buffer {
    uint8_t *pages, *bytes;
    size_t accessible, page;
};

static struct buffer place(const void *content, size_t bytes, int before_guard) {
    struct buffer b;
    b.page = (size_t)sysconf(_SC_PAGESIZE);
    b.accessible = (bytes + b.page) / b.page * b.page;
    b.pages = mmap(NULL, b.accessible + 2 * b.page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.pages == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    uint8_t *first = b.pages + b.page;
    memset(first, 0xa5, b.accessible);
    b.bytes = before_guard ? first + b.accessible - bytes : first;
    if (content) {
        memcpy(b.bytes, content, bytes);
        mprotect(first, b.accessible, PROT_READ);
    }
    mprotect(b.pages, b.page, PROT_NONE);
    mprotect(first + b.accessible, b.page, PROT_NONE);
    return b;
}

static void release(struct buffer b) { munmap(b.pages, b.accessible + 2 * b.page); }

static int poisoned(const uint8_t *from, const uint8_t *to) {
    while (from < to)
        if (*from++ != 0xa5) return 0;
    return 1;
}

static int untouched_around(struct buffer b, size_t bytes) {
    const uint8_t *first = b.pages + b.page;
    return poisoned(first, b.bytes) && poisoned(b.bytes + bytes, first + b.accessible);
}

/* Whether the results are the expected ones, with nothing written between and around them. */
static int right(const struct vector *v, struct buffer out, size_t out_bytes, struct buffer scratch) {
    const uint32_t *results = (const uint32_t *)out.bytes;
    if (!untouched_around(out, out_bytes) || !untouched_around(scratch, v->scratch_bytes)) {
        say_case("wrote around the results or the scratch");
        return 0;
    }
    for (uint64_t c = 0; c < v->columns; c++) {
        const uint32_t *found = results + c * v->out_stride;
        const uint32_t *expected = (const uint32_t *)(file + v->expected_at) + c * v->m;
        for (uint64_t r = 0; v->expected_at && r < v->m; r++)
            if (found[r] != expected[r]) {
                say_case("mismatch");
                printf("row %lu, column %lu: the reference gives %d, the kernel %d\n", (unsigned long)r,
                       (unsigned long)c, (int)expected[r], (int)found[r]);
                return 0;
            }
        for (uint64_t r = v->rows; c + 1 < v->columns && r < v->out_stride; r++)
            if (found[r] != poison) {
                say_case("wrote between the columns of results");
                return 0;
            }
    }
    return 1;
}

static int run(const struct vector *v, int before_guard) {
    size_t out_bytes = 4 * ((v->columns - 1) * v->out_stride + v->rows);
    struct buffer weights = place(file + v->weights_at, v->weights_bytes, before_guard);
    struct buffer activations = place(file + v->activations_at, v->activations_bytes, before_guard);
    struct buffer sums = place(file + v->sums_at, 4 * v->columns, before_guard);
    struct buffer out = place(NULL, out_bytes, before_guard);
    struct buffer scratch = place(NULL, v->scratch_bytes, before_guard);
    const uint8_t *last_column = activations.bytes + v->activations_bytes - v->column_bytes;
    struct buffer list = place(file + v->list_at, v->list_bytes, before_guard);
    struct kernel_args record = {weights.bytes, v->tiles,          activations.bytes, v->columns,    sums.bytes,
                                 out.bytes,     4 * v->out_stride, last_column,       scratch.bytes, list.bytes};
    /* Scale and sum follow the column, as the last two words. */
    struct step_args step = {activations.bytes, weights.bytes,                sums.bytes,
                             out.bytes,         out.bytes + 4 * (v->rows - 2), scratch.bytes};
    struct buffer args = v->tiles ? place(&record, sizeof record, before_guard) : place(&step, sizeof step, before_guard);
    now = v;
    placement = before_guard ? "before-guard" : "after-guard";
    kernels[v->kernel].run(args.bytes);
    int ok = right(v, out, out_bytes, scratch);
    release(weights), release(activations), release(sums), release(out), release(scratch), release(list);
    release(args);
    return ok;
}

int main(int argc, char **argv) {
    FILE *in = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!in || fseek(in, 0, SEEK_END)) {
        fprintf(stderr, "usage: driver VECTORS\n");
        return 2;
    }
    size_t bytes = (size_t)ftell(in);
    rewind(in);
    uint8_t *content = malloc(bytes);
    if (!content || fread(content, 1, bytes, in) != bytes) {
        perror(argv[1]);
        return 2;
    }
    file = content;
    signal(SIGSEGV, faulted);
    signal(SIGBUS, faulted);
    signal(SIGILL, faulted);
    uint64_t count = *(const uint64_t *)file;
    const struct vector *vectors = (const struct vector *)(file + 8);
    for (uint64_t i = 0; i < count; i++)
        for (int before_guard = 0; before_guard < 2; before_guard++)
            if (!run(&vectors[i], before_guard)) return 1;
    printf("%lu cases agree\n", 2 * (unsigned long)count);
    return 0;
}
