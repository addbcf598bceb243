// node browser.mjs FOLDER QUERY CHROMIUM [isolated]: open FOLDER/explain.html in headless Chromium and save its outputs.
//
// The page is served with onnxruntime-web's dist as ort/; isolated, it may use threads. Each of `globalThis.outputs` is
// written to <name>.bin in the current folder, and what the page tells is printed.

import { createReadStream, existsSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { extname, join, normalize } from 'node:path';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';

const [folder, query, executablePath, isolated] = process.argv.slice(2);
const ort = fileURLToPath(new URL('./node_modules/onnxruntime-web/dist/', import.meta.url));
const types = { '.html': 'text/html', '.mjs': 'text/javascript', '.wasm': 'application/wasm' };

const server = createServer((request, response) => {
    const path = normalize(new URL(request.url, 'http://localhost').pathname);
    const file = path.startsWith('/ort/') ? join(ort, path.slice(5)) : join(folder, path);
    if (!existsSync(file)) return response.writeHead(404).end();
    response.setHeader('Content-Type', types[extname(file)] ?? 'application/octet-stream');
    if (isolated) {
        response.setHeader('Cross-Origin-Opener-Policy', 'same-origin');
        response.setHeader('Cross-Origin-Embedder-Policy', 'require-corp');
    }
    createReadStream(file).pipe(response);
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));

const profile = await mkdtemp(join(tmpdir(), 'explain-'));
const args = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'];
const context = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args });
let code = 0;
try {
    const page = await context.newPage();
    const failed = new Promise((_, reject) => page.on('pageerror', (error) => reject(error)));
    await page.goto(`http://127.0.0.1:${server.address().port}/explain.html?${query}`);
    await Promise.race([page.waitForFunction(() => globalThis.outputs, null, { timeout: 300000 }), failed]);
    for (const name of await page.evaluate(() => Object.keys(outputs))) {
        const text = await page.evaluate(async (key) => {
            const reader = new FileReader();
            reader.readAsDataURL(new Blob([outputs[key].data]));
            await new Promise((resolve) => { reader.onload = resolve; });
            return reader.result.split(',')[1] ?? '';
        }, name);
        await writeFile(`${name}.bin`, Buffer.from(text, 'base64'));
    }
    if (await page.evaluate(() => crossOriginIsolated) !== Boolean(isolated)) throw new Error('isolation is not as asked');
    console.log(`${await page.textContent('#told')}`);
} catch (error) {
    console.error(error.message);
    code = 1;
}
await context.close();
server.close();
await rm(profile, { recursive: true, force: true });
process.exit(code);
